"""What really passes through the model in a step, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from exo_megatron.models.policy import PolicyModel

Sizes = torch.Size


def counted(work: Callable[[], object], *models: PolicyModel) -> dict[str, int]:
    """Run `work` and count, over all these models, which are whole in this process.

    tokens: that entered the first layer. projected: hidden states that were given out to be
    projected onto the vocabulary. flops: of every matrix product and attention kernel, forward and
    backward, by torch's FlopCounterMode; an attention kernel counts its whole query-key rectangle,
    causal or not.
    """
    tokens = projected = 0

    def enter(_module: object, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal tokens
        hidden: Tensor = named["hidden_states"] if "hidden_states" in named else inputs[0]
        tokens += hidden.shape[0]

    def leave(_module: object, _inputs: object, output: Tensor) -> None:
        nonlocal projected
        projected += output.shape[0]

    hooks = [model.decoder.layers[0].register_forward_pre_hook(enter, with_kwargs=True) for model in models]
    hooks += [model.register_forward_hook(leave) for model in models]
    flops = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    try:
        with flops:
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return {"tokens": tokens, "projected": projected, "flops": flops.get_total_flops()}


def _add_in_place(total: Sizes, left: Sizes, right: Sizes, *_: Any, **__: Any) -> int:
    return 2 * prod(left) * right[-1]


def _attention(query: Sizes, key: Sizes, value: Sizes, *_: Any, **__: Any) -> int:
    """Two products of [q, d] and [d, k] per head."""
    return 4 * prod(query) * key[-2]


def _attention_backward(grad: Sizes, query: Sizes, key: Sizes, *_: Any, **__: Any) -> int:
    """Five such products: scores again, and the gradients of values, weights, queries and keys."""
    return 10 * prod(query) * key[-2]


_FORMULAS: dict[Any, Any] = {
    torch.ops.aten.addmm_: _add_in_place,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
