"""Measurements of sides that compute the same."""

from __future__ import annotations

from dataclasses import dataclass

from exo_megatron.diagnosis.timing import Timings


@dataclass(frozen=True)
class Measured:
    """Seconds and peak bytes of each side, and the largest difference of its gradients from the
    exact or naive ones.
    """

    timings: Timings
    peaks: dict[str, int]
    differences: dict[str, float]
