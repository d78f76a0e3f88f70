"""A reward for data with known answers: whether the last number of a completion is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def right_number(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[float]) -> list[float]:
    """Return 1 for every completion whose last number is the record's `answer`, else 0.

    `answer` is a column of the data. A completion gets the value of the record that it belongs to.
    """
    found = (NUMBER.findall(completion) for completion in completions)
    return [float(bool(numbers) and float(numbers[-1]) == right) for numbers, right in zip(found, answer, strict=True)]
