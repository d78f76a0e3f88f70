"""What really passes through the model in a step, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from exo_megatron.models.policy import PolicyModel

Sizes = torch.Size


@contextmanager
def counted_passes(*models: PolicyModel) -> Iterator[list[tuple[int, int]]]:
    """Record passes through models that are whole in this process, in a list that grows meanwhile.

    Of each pass: the tokens that entered the first layer, and the hidden states that were given out
    to be projected onto the vocabulary.
    """
    passes: list[tuple[int, int]] = []
    tokens: list[int] = []

    def enter(_module: object, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        tokens.append((inputs[0] if inputs else named["hidden_states"]).shape[0])

    def leave(_module: object, _inputs: object, output: Tensor) -> None:
        passes.append((tokens.pop(), output.shape[0]))

    hooks = [model.decoder.layers[0].register_forward_pre_hook(enter, with_kwargs=True) for model in models]
    hooks += [model.register_forward_hook(leave) for model in models]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def counted(work: Callable[[], object], *models: PolicyModel) -> dict[str, int]:
    """Run `work` and count, over all these models, tokens and projected hidden states of all passes.

    flops: of every matrix product and attention kernel, forward and backward, by torch's
    FlopCounterMode; an attention kernel counts its whole query-key rectangle, causal or not.
    """
    flops = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counted_passes(*models) as passes, flops:
        work()
    tokens, projected = (sum(each) for each in zip(*passes, strict=True))
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
