"""Changes of the project's CUDA branch that the comparison must find. Each is undone when its block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from exo_megatron.models.attention import kernels
from exo_megatron.models.attention.kernels import FlashVarlenKernels
from exo_megatron.models.attention.passes import QKV, Attended, AttentionPass, ScoreRule

Method = Callable[..., Any]


@contextmanager
def _changed(owner: Any, name: str, change: Callable[[Method], Method]) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, change(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _transposed_sums(gradients: Method) -> Method:
    def changed(self: Any, totals: Any, grad: Tensor, inputs: QKV, merged: Attended, *rest: Any) -> QKV:
        return gradients(self, totals, grad, inputs, Attended(merged.output, merged.lse.t()), *rest)

    return changed


def _long_bounds(forward: Method) -> Method:
    def changed(self: Any, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> Attended:
        return forward(self, inputs, replace(pass_, key_bounds=pass_.key_bounds.long()), rule)

    return changed


def _bounds_on_host(forward: Method) -> Method:
    def changed(self: Any, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> Attended:
        return forward(self, inputs, replace(pass_, query_bounds=pass_.query_bounds.cpu()), rule)

    return changed


def _default_scale(merge: Method) -> Method:
    def changed(self: Any, merged: Attended, inputs: QKV, pass_: AttentionPass, rule: ScoreRule) -> None:
        merge(self, merged, inputs, pass_, replace(rule, scale=inputs.query.shape[-1] ** -0.5))

    return changed


def _equal_shares(merge: Method) -> Method:
    def changed(merged: Attended, other: Attended) -> None:
        merge(merged, Attended(other.output, merged.lse.clone()))

    return changed


def _negative(place: int) -> Callable[[Method], Method]:
    def change(gradients: Method) -> Method:
        def changed(*args: Any) -> QKV:
            result = list(gradients(*args))
            result[place] = -result[place]
            return QKV(*result)

        return changed

    return change


def _own_sums(gradients: Method) -> Method:
    """The backward of the first pass with its own output and log-sum-exp instead of the merged ones."""

    def changed(self: Any, totals: Any, grad: Tensor, inputs: QKV, merged: Attended, *rest: Any) -> QKV:
        return gradients(self, totals, grad, inputs, self.forward(inputs, *rest) if totals is None else merged, *rest)

    return changed


def _of(method: str, change: Callable[[Method], Method]) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _changed(FlashVarlenKernels, method, change)


CHANGES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "transposed log-sum-exps": _of("gradients", _transposed_sums),
    "cumulative lengths in int64": _of("forward", _long_bounds),
    "cumulative lengths on the host": _of("forward", _bounds_on_host),
    "a scale dropped in the merge": _of("merge", _default_scale),
    "equal shares in the merge": lambda: _changed(kernels, "merge_", _equal_shares),
    "a sign of the query's gradient": _of("gradients", _negative(0)),
    "a sign of the key's gradient": _of("gradients", _negative(1)),
    "the log-sum-exp of one pass": _of("gradients", _own_sums),
}
