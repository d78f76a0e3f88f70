"""The command `exo-megatron doctor`: the findings of `parallel/doctor.py`, or with --gpu the checks
of `diagnosis/`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from exo_megatron import __version__
from exo_megatron.cli.doctor_options import DoctorOptions
from exo_megatron.errors import ConfigError
from exo_megatron.parallel.doctor import Finding, check_collectives, check_devices, check_optional_parts, check_versions
from exo_megatron.utils.tables import render_table, stdout_width


def run_doctor() -> int:
    """Print all findings.

    Returns exit code 0 if the required packages and the collective work, else 1.
    """
    print(f"exo-megatron {__version__}")
    versions = _section("Versions", check_versions)
    essential = [each for each in versions if each.state != "ok"]
    if any(each.name in ("torch", "psutil") for each in essential):
        print("\nDevices and collectives are not looked at without torch and psutil.")
    else:
        _section("Devices", check_devices)
        _section("Optional parts", check_optional_parts)
        essential += [each for each in _section("Collective", check_collectives) if each.state != "ok"]
    if essential:
        print(f"\nNot ready: {', '.join(each.name for each in essential)}.")
        return 1
    print("\nReady: the essentials work.")
    return 0


def run_gpu_doctor(options: DoctorOptions) -> int:
    """Check what the device computes and how fast.

    Returns exit code 0 if no check failed, else 1. Raises ConfigError without a GPU, unless
    `options.cpu` asks for the small version on the CPU, which then is used although there is a GPU.
    """
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used
    import torch

    from exo_megatron.parallel.runtime import distributed_runtime

    if not (options.cpu or torch.cuda.is_available()):
        raise ConfigError(
            "doctor --gpu",
            f"torch {torch.__version__} sees no CUDA device",
            expected="an NVIDIA GPU and a CUDA build of torch",
            fix="see `exo-megatron doctor`; for a small version of the same checks on the CPU add --cpu",
        )
    with distributed_runtime() as runtime:
        # Imports megatron-core, of which the runtime has made sure that it goes with what is installed.
        from exo_megatron.diagnosis.run import diagnose

        return diagnose(runtime, minutes=options.minutes, json=options.json)


def _section(title: str, check: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    print(f"\n{title}", flush=True)
    findings = check()
    print(render_table((), [_cells(each) for each in findings], width=stdout_width(), indent=2), flush=True)
    return findings


def _cells(finding: Finding) -> tuple[str, str, str]:
    """Write a finding as cells, with blanks that give the columns one width in all sections."""
    advice = f"\n-> {finding.advice}" if finding.advice else ""
    return f"{finding.name:<18}", f"{finding.state:<7}", finding.detail + advice
