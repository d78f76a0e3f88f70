"""What is wrong with what a case did: collectives that NCCL refuses or that are slow, new waits, more operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.fake_cuda.cases import Case
from tests.fake_cuda.expected import FIGURES, PLACES


def problems(case: Case, found: Any) -> list[str]:
    """One line for each difference from the tables. Fewer waits or operators are one, too: lower the tables."""
    figures = FIGURES[case.name]
    lines = [f"collective: {line}" for line in found.bad_collectives]
    if not found.collectives:
        lines.append("collective: none was seen")
    waits, expected = Counter(found.waits), Counter({PLACES[name]: count for name, count in figures.waits.items()})
    lines += [f"{count} more waits for the device, {where}" for where, count in (waits - expected).items()]
    lines += [f"{count} fewer waits, lower FIGURES: {where}" for where, count in (expected - waits).items()]
    if found.operators_per_layer > figures.operators:
        lines.append(f"{found.operators_per_layer} operators per layer instead of {figures.operators}")
    elif found.operators_per_layer < figures.operators:
        lines.append(f"fewer operators per layer, lower FIGURES to {found.operators_per_layer}")
    return lines
