"""Comparison of a run's figures with those that were committed.

Counts of work must be equal. Ratios of times may be lower by noise: under WARN of the committed one
is told, under FAIL is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exo_megatron.errors import ConfigError
from exo_megatron.utils.files import read_json
from tools.bench.table import Record

FAIL, WARN = 0.75, 0.9


@dataclass(frozen=True)
class Finding:
    """One figure that is not as it was."""

    message: str
    fails: bool
    is_time: bool


def read_committed(path: Path, names: Sequence[str]) -> dict[str, list[Record]]:
    """Read the records of those of the named benchmarks that a file of `--json` has records of.

    Raises ConfigError if it has none.
    """
    written = read_json(path) if path.is_file() else {}
    kept = {name: written[name]["records"] for name in names if written.get(name, {}).get("records")}
    if not kept:
        raise ConfigError(
            "--compare",
            f"{path} has no records of {' or '.join(names)}",
            expected="a file that --json wrote of a run with one of these benchmarks",
            fix=f"python -m tools.bench {' '.join(names)} --json {path}",
        )
    return {
        name: [Record(case, each["counts"], each["ratios"]) for case, each in records.items()]
        for name, records in kept.items()
    }


def compare(now: Sequence[Record], committed: Sequence[Record]) -> list[Finding]:
    """List what differs from the committed figures."""
    return [finding for old in committed for finding in _compare_case({each.case: each for each in now}, old)]


def better(first: Sequence[Record], second: Sequence[Record]) -> list[Record]:
    """Take the larger of the ratios of two runs, and the counts of the first."""
    again = {record.case: record.ratios for record in second}
    return [
        replace(each, ratios={name: max(value, again[each.case][name]) for name, value in each.ratios.items()})
        for each in first
    ]


def _compare_case(now: Mapping[str, Record], old: Record) -> Iterator[Finding]:
    if old.case not in now:
        yield Finding(f"{old.case}: not measured", fails=True, is_time=False)
        return
    new = now[old.case]
    for name in old.counts.keys() | new.counts.keys():
        was, found = old.counts.get(name), new.counts.get(name)
        if was != found:
            yield Finding(f"{old.case}: {name} is {found}, committed {was}", fails=True, is_time=False)
    for name, was_ratio in old.ratios.items():
        ratio = new.ratios.get(name, 0.0)
        if ratio < WARN * was_ratio:
            shown = f"{old.case}: {name} is {ratio:.2f}, {ratio / was_ratio:.2f} of the committed {was_ratio:.2f}"
            yield Finding(shown, fails=ratio < FAIL * was_ratio, is_time=True)
