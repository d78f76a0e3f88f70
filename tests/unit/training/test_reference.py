"""Reference log-probs: those of the data are used, missing ones computed once and found again bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exo_megatron.data.groups import Group
from exo_megatron.data.logprob_source import LogprobSource
from exo_megatron.parallel.runtime import Runtime, distributed_runtime
from exo_megatron.training.reference import REFERENCE_FILE, complete_groups
from exo_megatron.utils.progress import Progress
from tests.reference.prepared import prepared

SOURCE = LogprobSource(fingerprint="f", temperature=0.8, precision="fp32")
BARE = [Group("a", (3,), ((4, 2), (5, 2))), Group("b", (6,), ((7, 2), (8, 2), (9, 2)))]
LOGPS = [(-1.0 / 3.0, -123.456789012345678), (-0.1, -1e-17, -800.0000000001)]
COMPLETE = [replace(group, reference_logprobs=logps) for group, logps in zip(BARE, LOGPS, strict=True)]


class KnownReference:
    """Stands for a reference model, without one."""

    def complete(self, groups: list[Group], progress: Progress | None = None) -> list[Group]:
        assert groups == BARE
        return COMPLETE


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    with distributed_runtime() as runtime:
        yield runtime


@pytest.mark.parametrize("other", [{"fingerprint": "g"}, {"temperature": 1.0}, {"precision": "bf16"}])
def test_another_reference_temperature_or_precision_is_computed_again(
    other: dict[str, object], tmp_path: Path, runtime: Runtime
) -> None:
    complete_groups(prepared(BARE), tmp_path, SOURCE, lambda: KnownReference().complete, runtime)
    with pytest.raises(AssertionError, match="a reference model was loaded"):
        complete_groups(prepared(BARE), tmp_path, replace(SOURCE, **other), refuse, runtime)


def test_other_data_are_computed_again(tmp_path: Path, runtime: Runtime) -> None:
    complete_groups(prepared(BARE), tmp_path, SOURCE, lambda: KnownReference().complete, runtime)
    changed = replace(BARE[0], candidates=((4, 2), (6, 2)))
    with pytest.raises(AssertionError, match="a reference model was loaded"):
        complete_groups(prepared([changed, BARE[1]]), tmp_path, SOURCE, refuse, runtime)


@pytest.mark.parametrize(
    ("before", "after"), [("-123.456789012345", "-123.456789012346"), ('"sha256": "', '"sha256": "0'), ("{", "")]
)
def test_a_damaged_file_is_told_and_computed_again(
    before: str, after: str, tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    complete_groups(prepared(BARE), tmp_path, SOURCE, lambda: KnownReference().complete, runtime)
    file, whole = tmp_path / REFERENCE_FILE, (tmp_path / REFERENCE_FILE).read_text()
    assert before in whole
    file.write_text(whole.replace(before, after, 1))
    again = complete_groups(prepared(BARE), tmp_path, SOURCE, lambda: KnownReference().complete, runtime)
    assert list(again) == COMPLETE and file.read_text() == whole
    assert f"{file} is damaged" in capsys.readouterr().out


def test_window_by_window(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the groups of one window are made at a time, and every one gets its own."""
    monkeypatch.setattr("exo_megatron.training.reference.WINDOW", 1)
    known = dict(zip([group.id for group in BARE], COMPLETE, strict=True))

    def complete(groups: list[Group], progress: Progress) -> list[Group]:
        (group,) = groups
        return [known[group.id]]

    assert list(complete_groups(prepared(BARE), tmp_path, SOURCE, lambda: complete, runtime)) == COMPLETE


STORED = [replace(group, reference_logprobs=(-7.0,) * len(group.candidates)) for group in BARE]


class LastIsMissing:
    """A reference that knows the second group only, and is asked for nothing else."""

    def complete(self, groups: list[Group], progress: Progress | None = None) -> list[Group]:
        assert groups == BARE[1:]
        return COMPLETE[1:]


def refuse() -> Any:
    raise AssertionError("a reference model was loaded")


def test_no_model_is_loaded_where_the_data_have_all(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(complete_groups(prepared(STORED), tmp_path, SOURCE, refuse, runtime)) == STORED
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "reference log-probs of 2 groups: 2 stored with the data\n"


def test_computed_once_where_the_data_have_none(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        list(complete_groups(prepared(BARE), tmp_path, SOURCE, lambda: KnownReference().complete, runtime)) == COMPLETE
    )
    assert capsys.readouterr().out == "reference log-probs of 2 groups: 2 computed by this run\n"
    assert list(complete_groups(prepared(BARE), tmp_path, SOURCE, refuse, runtime)) == COMPLETE
    assert capsys.readouterr().out == "reference log-probs of 2 groups: 2 computed by this run earlier\n"


def test_what_is_missing_is_computed_and_nothing_else(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [STORED[0], BARE[1]]
    for load in (lambda: LastIsMissing().complete, refuse):
        assert list(complete_groups(prepared(mixed), tmp_path, SOURCE, load, runtime)) == [STORED[0], COMPLETE[1]]
        assert "of 2 groups: 1 stored with the data, 1 computed by this run" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [REFERENCE_FILE]
