from __future__ import annotations

import json
from pathlib import Path

from exo_megatron.stages.run import (
    begin_stage,
    complete_stage,
    completed_digest,
    mark_stale,
    set_aside,
    started_digest,
)


def digests(output: Path) -> tuple[str | None, str | None]:
    """Of the configurations with which a directory was begun and completed."""
    return started_digest(output), completed_digest(output)


def test_marks_of_a_stage(tmp_path):
    output = tmp_path / "out"
    assert digests(output) == (None, None)
    begin_stage(output, "sft", config_text="a: 1\n", digest="d1")
    assert (output / "config.yaml").read_text() == "a: 1\n"
    assert digests(output) == ("d1", None)
    complete_stage(output, "sft", "d1")
    assert digests(output) == ("d1", "d1")
    assert json.loads((output / "stage.json").read_text()) == {
        "stage": "sft",
        "status": "complete",
        "config_digest": "d1",
    }


def test_beginning_again_takes_completion_away(tmp_path):
    begin_stage(tmp_path, "sft", config_text="", digest="d1")
    complete_stage(tmp_path, "sft", "d1")
    begin_stage(tmp_path, "sft", config_text="", digest="d2")
    assert digests(tmp_path) == ("d2", None)


def test_damaged_marks_count_as_none(tmp_path):
    for content in ("", "{", "[]", '{"status": "running", "config_digest": "d"}', '{"config_digest": 3}'):
        (tmp_path / "stage.json").write_text(content)
        assert completed_digest(tmp_path) is None, content


def test_stale_output_fits_no_digest(tmp_path):
    begin_stage(tmp_path, "sft", config_text="", digest="d1")
    complete_stage(tmp_path, "sft", "d1")
    mark_stale(tmp_path)
    started, completed = digests(tmp_path)
    assert completed is None
    assert started not in (None, "d1")


def test_directories_that_were_never_begun_stay_as_they_are(tmp_path):
    mark_stale(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_set_aside_takes_the_first_free_number(tmp_path):
    for number in (1, 2):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text(str(number))
        assert set_aside(tmp_path / "out") == tmp_path / f"out.old-{number}"
    assert (tmp_path / "out.old-1" / "x").read_text() == "1"
    assert not (tmp_path / "out").exists()
