"""Rotary position angles by position id, with the frequency scalings that HF's Llama family uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exo_megatron.models.spec import ModelSpec, RotaryScaling


def inverse_frequencies(spec: ModelSpec, device: torch.device) -> Tensor:
    """[head_dim / 2] fp32: base^(-2i/d), scaled as `spec.rotary_scaling` says (HF `ROPE_INIT_FUNCTIONS`)."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    frequencies = 1.0 / (spec.rotary_base**exponents)
    if spec.rotary_scaling is None:
        return frequencies
    if spec.rotary_scaling.kind == "linear":
        return frequencies / spec.rotary_scaling.factor
    return _llama3_scaled(frequencies, spec.rotary_scaling)


def _llama3_scaled(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by factor, short ones kept, a smooth ramp between."""
    wavelengths = 2 * math.pi / frequencies
    ramp = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smoothed = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    longest_kept = scaling.original_max_positions / scaling.high_freq_factor
    shortest_scaled = scaling.original_max_positions / scaling.low_freq_factor
    scaled = torch.where(wavelengths > shortest_scaled, frequencies / scaling.factor, frequencies)
    medium = (wavelengths <= shortest_scaled) & (wavelengths >= longest_kept)
    return torch.where(medium, smoothed, scaled)


def rotary_angles(position_ids: Tensor, frequencies: Tensor) -> Tensor:
    """Angles as megatron-core's attention takes them. position_ids [S], frequencies [d/2] -> [S, 1, 1, d] fp32."""
    half = position_ids.to(torch.float32).outer(frequencies)
    return torch.cat((half, half), dim=-1)[:, None, None, :]
