"""Random weights for tiny Hugging Face models, far from their usual initial values.

Norm weights differ from one, biases and position embeddings from zero, and logits spread over several nats, so that a
transposed, misplaced or forgotten tensor changes the results by much more than any tolerance.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from transformers import PreTrainedModel

ZERO_CENTRED_NORMS = {"gemma2", "gemma3_text"}  # norms multiply by 1 + weight

Model = TypeVar("Model", bound=PreTrainedModel)


def draw_weights(model: Model, *, seed: int, dtype: torch.dtype = torch.float32) -> Model:
    """Draw every parameter from `seed`, in fp32 and then rounded: matrices and embeddings normal(0, 0.12), biases
    normal(0, 0.2), norm weights uniform(0.5, 1.5), minus one where they are zero-centred. Returns `model`.
    """
    model = model.to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if model.config.model_type in ZERO_CENTRED_NORMS else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied embeddings appear once
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2, generator=generator)
            elif parameter.ndim == 1:
                parameter.uniform_(centre - 0.5, centre + 0.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.12, generator=generator)
    return _with_parameters_in(model, dtype)


def perturbed(model: Model, *, seed: int, scale: float) -> Model:
    """A copy of `model` with every parameter p multiplied by (1 + scale * normal): a policy near its reference."""
    result = copy.deepcopy(model).to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1.0 + scale * noise)
    return _with_parameters_in(result, model.dtype)


def _with_parameters_in(model: Model, dtype: torch.dtype) -> Model:
    """As from_pretrained does it: parameters change type, rotary frequencies stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
