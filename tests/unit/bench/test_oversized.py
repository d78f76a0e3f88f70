"""The comparison of a group in parts with the group in one micro-batch: that it runs, and sees wrong gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exo_megatron.models.attention.passes import StoredTensor
from tools.bench import oversized
from tools.bench.options import Options
from tools.bench.saved import saved_bytes
from tools.bench.sides import Different

QUICK = Options(quick=True, rounds=1, pictures=Path("unused"))


def test_quick_run() -> None:
    """Times of so small sizes say nothing; the activations are what the formula says."""
    table = oversized.run(QUICK)
    assert [row[:2] for row in table.rows] == [("24, 8, 4", "1"), ("5, 12, 4", "2")]
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        assert float(cells["over the formula"]) < oversized.MEMORY_TARGET
        assert 0 < float(cells["gradient difference"]) < 1e-5


def test_a_prompt_that_forgets_a_part_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_of_parts = StoredTensor.gradient.fget
    asked: set[StoredTensor] = set()

    def without_the_first(self: StoredTensor) -> Tensor:
        if self in asked:
            return sum_of_parts(self)
        asked.add(self)
        return torch.zeros_like(self.value)  # what the first part adds to it is lost

    monkeypatch.setattr(StoredTensor, "gradient", property(without_the_first))
    with pytest.raises(Different, match="relative difference"):
        oversized.run(QUICK)


def test_saved_bytes_counts_each_storage_once_and_weights_never() -> None:
    weight = torch.ones(10, requires_grad=True)

    def work() -> None:
        first = weight * 2.0  # saves nothing but the number
        kept = first.exp()  # saves its result: 40 bytes
        (kept * kept).sum().backward()  # saves the same storage twice more
        (weight * weight).sum().backward()  # saves the weight

    assert saved_bytes(work, without=[weight]) == 40
    assert saved_bytes(work, without=[]) == 40
