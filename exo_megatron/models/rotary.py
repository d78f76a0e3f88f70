"""Rotary position embedding, with the frequency scalings of HF's `ROPE_INIT_FUNCTIONS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from exo_megatron.models.spec import ModelSpec, Rotary, RotaryScaling


class RotaryTable:
    """The frequencies of some layers and how they are applied; see spec.Rotary.

    Layers with equal frequencies share a table, which computes cosines and sines once for all of
    them in a pass. It keeps those of the latest pass, as long as that has its positions.
    """

    def __init__(self, frequencies: Tensor, attention_factor: float, interleaved: bool) -> None:
        """Take frequencies [dim / 2] fp32."""
        self.frequencies = frequencies
        self.attention_factor = attention_factor
        self.interleaved = interleaved
        self._latest = WeakTensorKeyDictionary()  # positions -> turns, at most one

    def rotate(self, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query [S, hq, d] and key [S, hkv, d] by position_ids [S]; the dtype stays.

        Cosines and sines are computed in fp32 and rounded to the dtype of the heads, as HF does.
        """
        turns = self._turns(query, position_ids)
        rotation: Callable[..., Tensor] = _Rotation.apply if torch.is_grad_enabled() else _rotated
        cos, sin = turns.cos, turns.sin
        return rotation(query, cos, sin, self.interleaved), rotation(key, cos, sin, self.interleaved)

    def _turns(self, heads: Tensor, position_ids: Tensor) -> _Turns:
        """Return the turns at these positions: the latest ones, if they are of this very tensor."""
        turns: _Turns | None = self._latest.get(position_ids)
        if turns is None or not turns.are_of(position_ids, heads):
            turns = self._made(heads, position_ids)
            self._latest.clear()
            self._latest[position_ids] = turns
        return turns

    def _made(self, heads: Tensor, position_ids: Tensor) -> _Turns:
        angles = position_ids.to(torch.float32).outer(self.frequencies)
        cos, sin = (
            (part * self.attention_factor).to(heads.dtype).unsqueeze(1) for part in (angles.cos(), angles.sin())
        )
        both = cos.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((cos, cos), dim=-1)
        others = both.new_ones(*both.shape[:2], heads.shape[-1] - both.shape[-1])
        return _Turns(position_ids._version, torch.cat((both, others), dim=-1), sin)


@dataclass(frozen=True)
class _Turns:
    """Cosines and sines at the positions of one pass.

    Attributes:
        version: number of changes in place that the positions had seen.
        cos: [S, 1, d], of each coordinate's angle; 1 for those that are not rotated.
        sin: [S, 1, dim / 2], of each pair's angle.
    """

    version: int
    cos: Tensor
    sin: Tensor

    def are_of(self, positions: Tensor, heads: Tensor) -> bool:
        """Tell whether these are the turns of heads [S, h, d] at their positions as they are now."""
        return (
            self.version == positions._version
            and self.cos.dtype == heads.dtype
            and self.cos.shape[-1] == heads.shape[-1]
        )


class _Rotation(torch.autograd.Function):
    """Rotation of the first 2 * sin.shape[-1] dimensions of heads [S, h, d].

    The gradient is rotated back by the same angles, so nothing of the heads is kept.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(heads, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, ctx.interleaved, direction=-1), None, None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: int = 1) -> Tensor:
    """Rotate by the angles of `_Turns`, or by their negatives with direction -1."""
    dim = 2 * sin.shape[-1]
    turned = heads * cos
    first, second = _pair(heads, dim, interleaved)
    first_turned, second_turned = _pair(turned, dim, interleaved)
    first_turned.addcmul_(second, sin, value=-direction)
    second_turned.addcmul_(first, sin, value=direction)
    return turned


def _pair(heads: Tensor, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the two coordinates that each angle rotates: neighbours, or halves."""
    if interleaved:
        return heads[..., 0:dim:2], heads[..., 1:dim:2]
    return heads[..., : dim // 2], heads[..., dim // 2 : dim]


class RotaryTables:
    """The tables of a model's layers: one for layers with a window, one for the others."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._made: dict[bool, RotaryTable] = {}

    def of(self, layer: int) -> RotaryTable | None:
        """Return the table of a layer, numbered from 0 over all pipeline stages."""
        if self._spec.rotary is None:
            return None
        local = self._spec.window(layer) is not None
        if local not in self._made:
            self._made[local] = rotary_table(self._spec.rotary, local=local, device=self._device)
        return self._made[local]


def rotary_table(rotary: Rotary, *, local: bool, device: torch.device) -> RotaryTable:
    """Compute the table of a layer.

    local: whether the layer has a window, which gives it the base `rotary.local_base` where there
    is one.
    """
    if local and rotary.local_base is not None:
        frequencies = _unscaled(rotary.local_base, rotary.dim, device)
        return RotaryTable(frequencies, 1.0, rotary.interleaved)
    factor = rotary.scaling.attention_factor if rotary.scaling is not None else 1.0
    return RotaryTable(inverse_frequencies(rotary, device), factor, rotary.interleaved)


def inverse_frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """Compute base^(-2i/dim), scaled as `rotary.scaling` says, [dim / 2] fp32."""
    frequencies = _unscaled(rotary.base, rotary.dim, device)
    scaling = rotary.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3_scaled(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn_scaled(frequencies, rotary.base, scaling)
    return frequencies / torch.tensor(scaling.frequency_divisors, dtype=torch.float32, device=device)


def _unscaled(base: float, dim: int, device: torch.device) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (base**exponents)


def _llama3_scaled(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Scale as Llama 3.1: long wavelengths divided by factor, short ones kept, a ramp between."""
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


def _yarn_scaled(frequencies: Tensor, base: float, scaling: RotaryScaling) -> Tensor:
    """Scale by YaRN (arXiv 2309.00071, section 3.2).

    Frequencies with few turns over the trained length are divided by factor, those with many turns
    are kept.
    """
    dim = 2 * frequencies.shape[0]

    def place_of(turns: float) -> float:
        """Compute the index of the pair that makes this many turns over the trained length."""
        return dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place_of(scaling.beta_fast), place_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    places = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    divided = ((places - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)
