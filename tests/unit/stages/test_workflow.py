"""A workflow: order, skipping, running again, and what becomes of earlier output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exo_megatron.cli.main import main
from exo_megatron.config.load import load_run_config
from exo_megatron.stages import run as stages

RUN = """\
stages:
  - {name: base, stage: import, config: {hf: /models/x}}
  - name: sft
    stage: sft
    config: {model: {checkpoint: "${base}"}, data: {path: d.jsonl}}
  - name: other
    stage: export
    config: {model: {checkpoint: "${base}"}}
  - name: candidates
    stage: rollout
    config: {model: {checkpoint: "${sft}"}, data: {path: p.jsonl}}
  - name: scored
    stage: score
    config: {candidates: "${candidates}", reward: {function: "a:b"}}
"""
ALL = ["base", "sft", "other", "candidates", "scored"]


@pytest.fixture
def run(tmp_path, calls):
    file = tmp_path / "run.yaml"
    file.write_text(RUN)

    def run(*overrides: str, code: int = 0) -> list[str]:
        assert main(["run", "--config", str(file), f"output={tmp_path / 'out'}", *overrides]) == code
        return calls.take()

    return run


def test_stages_run_in_order_and_once(run, tmp_path, capsys):
    assert run() == ALL
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"base: started, output in {tmp_path}/out/base", "base: done in 0:00"]
    assert len(lines) == 10
    assert run() == []
    assert capsys.readouterr().out.splitlines() == [f"{name}: complete already, skipped" for name in ALL]


def test_resolved_run_is_written(run, tmp_path):
    run("stages.sft.seed=5")
    written = load_run_config(tmp_path / "out" / "run.yaml", [])
    assert [each.config.seed for each in written.stages] == [0, 5, 0, 0, 0]
    mark = json.loads((tmp_path / "out" / "sft" / "stage.json").read_text())
    assert mark["config_digest"] == written.stages[1].digest


def test_a_changed_stage_and_what_reads_it_run_again(run, tmp_path, capsys):
    run()
    capsys.readouterr()
    assert run("stages.sft.optimizer.lr=0.5") == ["sft", "candidates", "scored"]
    out = capsys.readouterr().out
    assert f"sft: its configuration or inputs changed; the earlier output is kept in {tmp_path}/out/sft.old-1" in out
    assert (tmp_path / "out" / "sft.old-1" / "result").exists()
    assert run("stages.sft.optimizer.lr=0.5") == []


@pytest.mark.parametrize("succeeding", [0, 1])
def test_stopped_while_an_earlier_export_is_set_aside(run, tmp_path, monkeypatch, succeeding):
    """Its output and its status are two directories: the status goes last, and so always says whose the output is."""
    run()
    done = []

    def set_aside(path):
        if len(done) == succeeding:
            raise KeyboardInterrupt
        done.append(path.name)
        return rename(path)

    with monkeypatch.context() as patch:
        rename = stages.set_aside
        patch.setattr(stages, "set_aside", set_aside)
        run("stages.other.dtype=bf16", code=130)
    assert done == ["other"][:succeeding]
    assert run("stages.other.dtype=bf16") == ["other"]
    assert (tmp_path / "out" / "other.old-1" / "result").exists()
    assert (tmp_path / "out" / "other" / "result").exists()
    assert run("stages.other.dtype=bf16") == []


def test_output_of_another_configuration_is_not_found_by_the_stage(run, calls):
    seen = {}
    calls.actions["sft"] = lambda config: seen.update(found=(config.output / "result").exists())
    run()
    run("stages.sft.seed=3")
    assert seen == {"found": False}


def test_a_failed_run_goes_on_where_it_stopped(run, calls, tmp_path):
    def fail(config):
        (config.output / "half").write_text("done")
        raise OSError("no luck")

    calls.actions["candidates"] = fail
    assert run(code=1) == ["base", "sft", "other", "candidates"]
    del calls.actions["candidates"]
    assert run() == ["candidates", "scored"]
    # The interrupted stage found its own half-done work.
    assert (tmp_path / "out" / "candidates" / "half").exists()


def test_removed_output_is_made_again_with_all_that_reads_it(run, tmp_path):
    run()
    shutil.rmtree(tmp_path / "out" / "sft")
    assert run() == ["sft", "candidates", "scored"]
    assert (tmp_path / "out" / "scored.old-1").exists()


def test_an_interruption_between_does_not_hide_stale_output(run, calls, tmp_path):
    run()
    shutil.rmtree(tmp_path / "out" / "sft")

    def fail(config):
        raise OSError("no luck")

    calls.actions["candidates"] = fail
    assert run(code=1) == ["sft", "candidates"]
    del calls.actions["candidates"]
    assert run() == ["candidates", "scored"]


def test_nothing_runs_when_a_later_stage_is_wrong(run, tmp_path, capsys):
    assert run("stages.scored.reward.function=nonsense", code=2) == []
    assert "stages.scored.reward.function: got 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_no_stage_began_is_left_in_place(run, tmp_path):
    own = tmp_path / "out" / "sft"
    own.mkdir(parents=True)
    (own / "notes").write_text("mine")
    assert run() == ALL
    assert (own / "notes").read_text() == "mine"
    assert not Path(f"{own}.old-1").exists()
