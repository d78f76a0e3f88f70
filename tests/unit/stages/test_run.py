"""Agreement of the ranks, and the functions of the stages."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from exo_megatron.checkpoint.directory import STEPS_DIRECTORY, make_manifest, step_directory, write_manifest
from exo_megatron.cli.main import main
from exo_megatron.errors import ConfigError, DataError
from exo_megatron.parallel.ending import check_same
from exo_megatron.stages import run as stages
from exo_megatron.stages.run import check_agreement, load_function, program_versions
from tests.unit.conftest import Calls, Rank


def test_ranks_with_other_settings_versions_or_code():
    same = {"configuration": "a", **program_versions()}
    check_agreement("a", Rank(others=[same]))
    with pytest.raises(ConfigError, match="rank 2: its configuration differs"):
        check_agreement("a", Rank(others=[same, same | {"configuration": "b"}]))
    for what, told in (("version of torch", " (other, not "), ("code of exo-megatron", ";")):
        with pytest.raises(ConfigError, match=re.escape(f"rank 1: its {what} differs from that of rank 0{told}")):
            check_agreement("a", Rank(others=[same | {what: "other"}]))


def test_ranks_that_read_something_else():
    host, read = socket.gethostname(), {"data": "1", "policy": "2"}
    check_same(Rank(others=[(host, read)]), read)
    for what in read:
        with pytest.raises(DataError, match=f"rank 2, n2: reads something else than rank 0 .* as {what};"):
            check_same(Rank(others=[(host, read), ("n2", read | {what: "3"})]), read)


def test_the_digest_of_the_code_is_that_of_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A copy of the package, in which one character of a deep file differs."""
    package = Path(stages.__file__).parents[1]
    copied = shutil.copytree(package, tmp_path / "exo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stages, "__file__", str(copied / "stages" / "run.py"))
    here = program_versions()
    assert len({here[what] for what in here if what.startswith("code")}) == 1
    with (copied / "parallel" / "watch" / "wire.py").open("a") as file:
        file.write("#")
    assert {what for what, found in program_versions().items() if here[what] != found} == {"code of exo-megatron"}


def test_targets():
    assert load_function("exo_megatron.stages.run:load_function") is load_function


def add_step(output: Path, step: int) -> None:
    checkpoint = step_directory(output / STEPS_DIRECTORY, step)
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, make_manifest({}, step=step, kind="training"))


def test_an_evaluation_runs_again_when_there_are_new_steps(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, reference, output = tmp_path / "exo", tmp_path / "sft", tmp_path / "eval"
    words = [f"output={output}", f"models.exo={trained}", "models.base=b", f"reference.checkpoint={reference}"]

    def evaluate() -> list[str]:
        assert main(["evaluate", *words, "data.path=d.jsonl", "reward.function=a:b"]) == 0
        return calls.take()

    for change in (lambda: None, lambda: add_step(trained, 3), lambda: add_step(trained, 7)):
        change()
        assert evaluate() == ["eval"]
        assert evaluate() == []
    add_step(reference, 2)
    assert evaluate() == ["eval"]
    add_step(reference, 1)  # an older one changes nothing
    capsys.readouterr()
    assert evaluate() == []
    done = f"evaluate: complete already in {output} with this configuration (inputs are not compared)"
    assert capsys.readouterr().out == f"{done}, nothing to do; remove it to run it again\n"


def test_an_evaluation_in_a_workflow_runs_again_when_there_are_new_steps(calls: Calls, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    settings = f"models: {{exo: {tmp_path / 'exo'}}}, reference: {{checkpoint: b}}, data: {{path: d}}"
    file.write_text(
        f"stages:\n  - {{name: eval, stage: evaluate, config: {{{settings}, reward: {{function: 'a:b'}}}}}}\n"
    )

    def run() -> list[str]:
        assert main(["run", "--config", str(file), f"output={tmp_path / 'out'}"]) == 0
        return calls.take()

    for step in (3, 7):
        add_step(tmp_path / "exo", step)
        assert run() == ["eval"]
        assert run() == []
    assert (tmp_path / "out" / "eval.old-1").is_dir()
