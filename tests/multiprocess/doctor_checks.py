"""Checks of `doctor --gpu` on several ranks, as they are and sabotaged. Run by tests/multiprocess/harness.py."""

from __future__ import annotations

import math
from unittest import mock

from exo_megatron.diagnosis.checklist import SIZES, correctness_checks
from exo_megatron.diagnosis.checks import run_check
from exo_megatron.diagnosis.run import make_site, shared_directory
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.training import step

TENSOR, DATA, EXPERTS = "step in fp32, TP=2", "step in fp32, DP=2", "step of a mixture of experts in fp32, EP=2"
OTHERS = ("log-probs in bf16, TP=2", "checkpoint made on the CPU in bf16, TP=2", "greedy decoding in bf16, TP=2")
REDUCTION_OF_NORMS = "megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads"


def verdicts(runtime: Runtime) -> dict[str, dict[str, str]]:
    """Sabotage -> check -> verdict."""
    with shared_directory(runtime) as directory:
        site = make_site(runtime, directory, SIZES["cpu"].small)
        checks = {check.name: check for check in correctness_checks(site, SIZES["cpu"])}

        def run(*names: str) -> dict[str, str]:
            return {name: run_check(checks[name], runtime, math.inf).verdict for name in names}

        found = {"none": run(TENSOR, DATA, EXPERTS, *OTHERS)}
        with mock.patch(REDUCTION_OF_NORMS, lambda *arguments, **named: None):
            found["gradients of norms are partial sums"] = run(TENSOR)
        loss = step._loss
        with mock.patch.object(step, "_loss", lambda total, *, count: loss(total, count=count + 1)):
            found["the mean is over more groups than there are"] = run(DATA, EXPERTS)
    return found
