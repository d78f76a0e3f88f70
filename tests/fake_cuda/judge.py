"""What is wrong with what a case did: collectives that NCCL refuses or that are slow, new waits, more operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.fake_cuda.cases import Case
from tests.fake_cuda.expected import FIGURES, WAITS


def expected_waits(case: Case) -> Counter[str]:
    """Where the host waits for the device today, and how often."""
    _, norms = FIGURES[case.name]
    return Counter({where: norms if count is None else count for where, count in WAITS[case.work].items()})


def problems(case: Case, found: Any) -> list[str]:
    """One line for each difference from the tables. Fewer waits or operators are one, too: lower the tables."""
    lines = [f"collective: {line}" for line in found.bad_collectives]
    if not found.collectives:
        lines.append("collective: none was seen")
    waits, expected = Counter(found.waits), expected_waits(case)
    lines += [f"{count} more waits for the device, {where}" for where, count in (waits - expected).items()]
    lines += [f"{count} fewer waits: lower WAITS, {where}" for where, count in (expected - waits).items()]
    operators, _ = FIGURES[case.name]
    if found.operators_per_layer > operators:
        lines.append(f"{found.operators_per_layer} operators per layer instead of {operators}")
    elif found.operators_per_layer < operators:
        lines.append(f"fewer operators per layer: lower FIGURES to {found.operators_per_layer}")
    return lines
