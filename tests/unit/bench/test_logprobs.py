"""The comparison of log-probs, and of head and loss: that it runs, and that it sees wrong gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exo_megatron.logprobs.weight_gradient import WeightGradient
from tools.bench import head_loss, logprob_sides, logprobs
from tools.bench.options import Options
from tools.bench.sides import Different

QUICK = Options(quick=True, rounds=1, pictures=Path("unused"))
CPU = torch.device("cpu")
GROUP = logprobs.QUICK_GROUPS[0]


def test_quick_run_compares_all_sides() -> None:
    table = logprobs.run(QUICK)
    sides = [row[1:3] for row in table.rows]
    at_equal_rows = [
        (other, ours)
        for other in (logprob_sides.NAIVE, logprob_sides.MEGATRON)
        for ours in (logprob_sides.KEPT, logprob_sides.RECOMPUTED)
    ]
    of_groups = [(head_loss.STRAIGHT, ours) for ours in head_loss.MEMORY_MIB]
    assert sides[:4] == at_equal_rows and sides[-6:] == 2 * of_groups
    assert len(sides) == (10 if torch.cuda.is_available() and torch.cuda.device_count() == 1 else 14)
    column = table.columns.index("gradient difference")
    assert all(0 < float(row[column]) < 1e-5 for row in table.rows)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_wrong_gradient_of_the_weight_is_seen(buffer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the tokens that share the prompt's last row are lost."""
    monkeypatch.setattr(WeightGradient, "add_at", lambda *unused: None)
    with pytest.raises(Different, match="relative difference"):
        head_loss.compare(GROUP, CPU, 1, buffer=buffer)


def test_a_wrong_gradient_of_the_hidden_states_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of K copies of the prompt's last row is forgotten: the straightforward side differs."""
    right = head_loss.HeadAndLoss.straightforward

    def wrong(self: head_loss.HeadAndLoss) -> Tensor:
        self.separate.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), 0.0))
        return right(self)

    monkeypatch.setattr(head_loss.HeadAndLoss, "straightforward", wrong)
    with pytest.raises(Different, match="relative difference"):
        head_loss.compare(GROUP, CPU, 1, buffer=False)


def test_a_difference_in_other_processes_is_told() -> None:
    """With no tolerance rounding is one."""
    with pytest.raises(Different, match="TP2: relative difference"):
        logprobs.measure_in_world(2, logprobs.QUICK_SIZE, 1, tolerance=0.0)
