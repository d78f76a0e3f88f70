"""Memory that autograd keeps for the backward pass: the activations, without weights and
temporary buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(work: Callable[[], object], *, without: Iterable[Tensor]) -> int:
    """Measure the peak, while `work` runs, of the bytes of distinct storages that graphs hold.
    without: weights.

    Every tensor that an operation saves is seen (`save_for_backward` of our own functions, too). A
    storage counts whole and once, however many operations save it, from the first that does until
    the last has run backward.
    """
    ledger = _Ledger({tensor.untyped_storage().data_ptr() for tensor in without})
    with saved_tensors_hooks(lambda tensor: _Entry(tensor, ledger), lambda entry: entry.tensor):
        work()
    return ledger.peak


class _Ledger:
    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.holders: Counter[int] = Counter()
        self.held = self.peak = 0


class _Entry:
    """A saved tensor, which counts its storage for as long as a graph holds the entry."""

    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        self.tensor = tensor.detach()
        self.ledger = ledger
        storage = tensor.untyped_storage()
        self.place, self.size = storage.data_ptr(), storage.nbytes()
        if self.place in ledger.ignored:
            return
        ledger.holders[self.place] += 1
        if ledger.holders[self.place] == 1:
            ledger.held += self.size
            ledger.peak = max(ledger.peak, ledger.held)

    def __del__(self) -> None:
        if self.place in self.ledger.ignored:
            return
        self.ledger.holders[self.place] -= 1
        if self.ledger.holders[self.place] == 0:
            self.ledger.held -= self.size
