"""What is wrong with what a case did.

Collectives that NCCL refuses, new waits of the host, copies that hold a step up, memory used too early, large
temporaries, more operators.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from exo_megatron.models.numerics import LARGEST_TEMPORARY
from tests.fake_cuda.cases import Case
from tests.fake_cuda.expected import FIGURES, PLACES


def problems(case: Case, found: Any) -> list[str]:
    """One line for each difference from the table. Fewer waits or operators are one, too: lower the table."""
    figures = FIGURES[case.name]
    lines = [f"collective: {line}" for line in found.bad_collectives]
    if case.world_size > 1 and not found.collectives:
        lines.append("collective: none was seen")
    waits, expected = Counter(found.waits), Counter({PLACES[name]: count for name, count in figures.waits.items()})
    lines += [f"{count} more waits for the device, {where}" for where, count in (waits - expected).items()]
    lines += [f"{count} fewer waits, lower FIGURES: {where}" for where, count in (expected - waits).items()]
    if case.work.startswith("train"):
        lines += [f"{count} copies to the device not made ahead, {where}" for where, count in found.pageable.items()]
        lines += [f"fp32 matrix of {found.wide[0]} bytes, {found.wide[1]}"] if found.wide[0] > LARGEST_TEMPORARY else []
    lines += [f"unsafe: {where}" for where in found.unsafe]
    lines += _compared("operators per layer", found.operators_per_layer, figures.operators)
    return lines + _compared("copies to the device", sum(found.uploads.values()), figures.uploads)


def _compared(what: str, found: float, expected: float) -> list[str]:
    if found < expected:
        return [f"fewer {what}, lower FIGURES to {found}"]
    return [f"{found} {what} instead of {expected}"] if found > expected else []
