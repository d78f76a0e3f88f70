"""Verdicts of single checks: time that is not there, exceptions, figures that are not numbers, fast machines."""

from __future__ import annotations

import math
import time

from exo_megatron.diagnosis.checklist import SIZES, speed_checks
from exo_megatron.diagnosis.checks import DeviceCheck, Figure, Outcome, judge, run_check
from exo_megatron.diagnosis.machine import Machine, sheet_flops


def test_what_does_not_fit_into_the_time_is_named(runtime):
    check = DeviceCheck("slow", lambda: 30.0, lambda: Outcome("passed", "", ""))
    now = time.monotonic()
    assert run_check(check, runtime, now + 20).verdict == "not run (time)"
    assert "30 s" in run_check(check, runtime, now + 20).expected
    assert run_check(check, runtime, now + 600).verdict == "passed"


def test_a_check_that_raises_has_failed(runtime):
    def broken():
        raise RuntimeError("no kernel image is available")

    result = run_check(DeviceCheck("broken", lambda: 0.0, broken), runtime, math.inf)
    assert (result.verdict, result.seen) == ("failed", "RuntimeError: no kernel image is available")


def test_a_figure_that_is_not_a_number_fails():
    assert judge([Figure("loss", math.nan, 1.0)]).verdict == "failed"
    assert judge([Figure("loss", 1.0, 1.0)]).verdict == "passed"


def test_a_fast_machine_makes_the_speed_slower_than_expected(runtime):
    fast = Machine(flops=1e18, bytes_per_second=1e18, sheet_flops=None)
    checks = {check.name: check for check in speed_checks(runtime, SIZES["cpu"], fast)}
    for name in ("host time of a layer", "decoding of a 0.5M model at K=8"):
        assert checks[name].run().verdict == "slower than expected"


def test_devices_are_known_by_their_longest_name():
    assert sheet_flops("NVIDIA H100 PCIe") == 756e12
    assert sheet_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert sheet_flops("NVIDIA GH200 480GB") == 989e12
    assert sheet_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert sheet_flops("NVIDIA GeForce RTX 4090") is None
