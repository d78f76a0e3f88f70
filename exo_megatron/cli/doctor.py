"""`exo-megatron doctor`: prints what `parallel/doctor.py` finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from exo_megatron import __version__
from exo_megatron.parallel.doctor import (
    Finding,
    check_collectives,
    check_devices,
    check_optional_parts,
    check_versions,
)


def run_doctor() -> int:
    """Print all findings. Exit code 0 if the required packages and the collective work, else 1."""
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


def _section(title: str, check: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    print(f"\n{title}", flush=True)
    findings = check()
    for each in findings:
        print(f"  {each.name:<20} {each.state:<8} {each.detail}", flush=True)
        if each.advice:
            print(f"  {'':<20} {'':<8} -> {each.advice}", flush=True)
    return findings
