"""`doctor --gpu` on two ranks: its checks pass, and fail when gradients are not those of one process."""

from __future__ import annotations

from tests.multiprocess.doctor_checks import DATA, EXPERTS, OTHERS, TENSOR
from tests.multiprocess.harness import Check, run_checks


def test_checks_of_two_ranks(tmp_path):
    outcomes = run_checks(2, [Check("verdicts", "tests.multiprocess.doctor_checks:verdicts", {})], tmp_path)
    for verdicts in outcomes["verdicts"].values():  # all ranks learn the same
        assert verdicts == {
            "none": dict.fromkeys((TENSOR, DATA, EXPERTS, *OTHERS), "passed"),
            "gradients of norms are partial sums": {TENSOR: "failed"},
            "the mean is over more groups than there are": {DATA: "failed", EXPERTS: "failed"},
        }
