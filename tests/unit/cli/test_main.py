"""The command line in this process: dispatch, marks, exit codes and what is printed."""

from __future__ import annotations

import json

import pytest

from exo_megatron import __version__
from exo_megatron.cli.main import main
from exo_megatron.config.document import config_digest
from exo_megatron.config.load import load_stage_config
from exo_megatron.config.stages import STAGE_CONFIGS
from exo_megatron.errors import DataError, TryAgainLater
from exo_megatron.stages.run import STAGE_FUNCTIONS

SCORE = ["score", "candidates=c", "reward.function=a:b"]


def test_a_stage_runs_between_its_marks(calls, tmp_path, capsys):
    output = tmp_path / "out"
    assert main([*SCORE, f"output={output}"]) == 0
    assert calls.take() == ["out"]
    config = load_stage_config("score", output / "config.yaml", [])
    mark = json.loads((output / "stage.json").read_text())
    assert mark == {"stage": "score", "status": "complete", "config_digest": config_digest(config)}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"score: started, output in {output}", "score: done in 0:00"]


def test_config_file_and_settings_in_any_order(calls, tmp_path):
    file = tmp_path / "score.yaml"
    file.write_text("candidates: c\nseed: 1\nreward: {function: 'a:b'}\n")
    seen = []
    calls.actions["out"] = lambda config: seen.append(config.seed)
    assert main(["score", f"output={tmp_path / 'out'}", "--config", str(file), "seed=5"]) == 0
    assert main(["score", f"--config={file}", f"output={tmp_path / 'out'}"]) == 0
    assert seen == [5, 1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("d.jsonl:3", "bad", expected="good", fix="mend"), 2),
        (TryAgainLater("http://x", "down", expected="an answer", fix="wait"), 75),
    ],
)
def test_errors_of_a_stage_are_one_line(calls, tmp_path, capsys, error, code):
    def fail(config):
        raise error

    calls.actions["out"] = fail
    assert main([*SCORE, f"output={tmp_path / 'out'}"]) == code
    assert capsys.readouterr().err == f"exo-megatron: {error}\n"
    assert not (tmp_path / "out" / "stage.json").exists()


def test_other_failures_have_a_traceback(calls, tmp_path, capsys):
    def fail(config):
        raise ZeroDivisionError("by nought")

    calls.actions["out"] = fail
    assert main([*SCORE, f"output={tmp_path / 'out'}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: by nought\n")


def test_interruption(calls, tmp_path, capsys):
    def fail(config):
        raise KeyboardInterrupt

    calls.actions["out"] = fail
    assert main([*SCORE, f"output={tmp_path / 'out'}"]) == 130
    assert capsys.readouterr().err == "exo-megatron: interrupted\n"


def test_output_that_cannot_be_written(calls, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*SCORE, f"output={tmp_path / 'file' / 'out'}"]) == 2
    assert "could not be written (Not a directory" in capsys.readouterr().err
    assert calls.take() == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["scor"], "unknown command 'scor'; expected one of import, sft,"),
        (["scor"], "fix: write score"),
        (["score", "--confg", "x"], "unknown option '--confg'"),
        (["score", "--config"], "--config: names no file"),
        (["score", "--config="], "--config: names no file"),
        (["score", "--config", "a", "--config=b"], "--config: given twice"),
        (["score", "--config", "none.yaml"], "none.yaml: cannot be read (No such file or directory)"),
        (["score", "output"], "got 'output'; expected key.path=value"),
        (["run", "output=x"], "stages: missing"),
        (["doctor", "x=1"], "doctor has no setting 'x'"),
        ([*SCORE], "output: missing"),
    ],
)
def test_wrong_command_lines(calls, capsys, words, text):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.startswith("exo-megatron: ")
    assert len(err.splitlines()) == 1
    assert calls.take() == []


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "3"}, False),
        ({"SLURM_PROCID": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"PMIX_RANK": "0"}, True),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
    ],
)
def test_config_errors_are_told_by_rank_0(monkeypatch, capsys, env, told):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["score"]) == 2
    assert bool(capsys.readouterr().err) is told


def test_general_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in (*STAGE_CONFIGS, "run", "doctor"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {command} "))
        assert len(line.split(maxsplit=1)[1]) > 20
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"exo-megatron {__version__}\n"
    assert main([]) == 2


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_stage_help_lists_every_key(capsys, stage):
    assert main([stage, "--help"]) == 0
    text = capsys.readouterr().out

    def leaves(section, prefix=""):
        for name, info in section.model_fields.items():
            annotation = info.annotation
            if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
                yield from leaves(annotation, f"{prefix}{name}.")
            else:
                yield prefix + name

    lines = text.splitlines()
    for key in leaves(STAGE_CONFIGS[stage]):
        (index,) = (n for n, line in enumerate(lines) if line.startswith(f"  {key} "))
        assert "required" in lines[index] or "default" in " ".join(lines[index : index + 2]), key
    assert max(map(len, lines)) <= 120


def test_help_shows_type_default_and_meaning(capsys):
    main(["sft", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "optimizer.lr number > 0, default 1e-05 largest learning rate" in text
    assert "compute.precision one of fp32, bf16, default bf16 type of" in text
    assert "model.checkpoint path, required distributed checkpoint" in text
    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "${NAME} for the output of the stage NAME" in text
    assert "stages.N.stage one of import, sft, rollout, score, align, evaluate, export, required" in text
    assert main(["doctor", "--help"]) == 0
    assert "usage: exo-megatron doctor" in capsys.readouterr().out


def test_the_table_has_every_stage():
    assert list(STAGE_FUNCTIONS) == list(STAGE_CONFIGS)
    assert all(target.startswith("exo_megatron.") and target.count(":") == 1 for target in STAGE_FUNCTIONS.values())
