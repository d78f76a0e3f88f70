"""Outputs of the conversion stages: run again, through links, in the working directory; the user's files stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from exo_megatron.checkpoint import publish
from exo_megatron.checkpoint.safety import verify_checkpoint
from exo_megatron.config.sections import ModelConfig
from exo_megatron.config.stages import STAGE_FILES, ExportConfig, ImportConfig
from exo_megatron.errors import CheckpointError
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages import run as stages
from tests.unit.conversion.conftest import Imports, tensors_of

Export = Callable[..., None]


class Killed(BaseException):
    """Ends a stage like SIGKILL would: no handler of failures runs."""


def kill(*args: Any, **kwargs: Any) -> None:
    raise Killed


@pytest.fixture
def in_this_process(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def distributed_runtime(*limits: object) -> Iterator[Runtime]:
        yield runtime

    monkeypatch.setattr(stages, "distributed_runtime", distributed_runtime)


@pytest.fixture
def export_to(tmp_path: Path, hf: Path, convert: Imports, in_this_process: None) -> Export:
    """export_to(output, dtype="keep"): the stage, with all its files."""
    checkpoint = convert(hf, tmp_path / "checkpoint")

    def export_to(output: Path, dtype: Any = "keep") -> None:
        stages.run_stage(
            "export", ExportConfig(model=ModelConfig(checkpoint=checkpoint), output=output, dtype=dtype, seed=0)
        )

    return export_to


def dtypes(directory: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors_of(directory).values()}


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_an_export_stopped_before_its_last_file_goes_on(
    export_to: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "complete_stage", kill)
        with pytest.raises(Killed):
            export_to(output)
    assert (output / "config.json").is_file()
    export_to(output)
    assert dtypes(output) == {torch.float32}
    capsys.readouterr()
    export_to(output)
    assert "complete already" in capsys.readouterr().out


def test_an_export_with_other_settings_replaces_the_earlier_one(export_to: Export, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for dtype, made in (("keep", torch.float32), ("bf16", torch.bfloat16), ("keep", torch.float32)):
        export_to(output, dtype)
        assert dtypes(output) == {made}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.exo-megatron", "checkpoint", "hf", "out"]


def test_files_of_the_user_in_the_place_of_an_export_stay(export_to: Export, tmp_path: Path, hf: Path) -> None:
    output = tmp_path / "out"
    export_to(output)
    shutil.rmtree(output)
    shutil.copytree(hf, output, copy_function=shutil.copyfile)
    before = content(output)
    assert "config.json" in before and "model.safetensors" in before
    for dtype in ("bf16", "keep"):
        with pytest.raises(CheckpointError, match="already holds a complete output"):
            export_to(output, dtype)
        assert content(output) == before


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json"])
def test_a_file_that_the_user_wrote_into_an_export_stays(export_to: Export, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    export_to(output)
    (output / name).write_text("mine")
    before = content(output)
    with pytest.raises(CheckpointError, match=rf"is not empty \({name}\)"):
        export_to(output, "bf16")
    assert content(output) == before


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_stopped_while_the_earlier_export_is_removed(
    export_to: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    output = tmp_path / "out"
    export_to(output)
    take_away = publish._take_away

    def stopped(target: Path, names: set[str], marker: str) -> None:
        renamed: list[Path] = []

        def rename(source: Path, destination: Path) -> None:
            if len(renamed) == moved:
                raise Killed
            renamed.append(destination)
            os.replace(source, destination)

        with monkeypatch.context() as patch:
            patch.setattr(publish.os, "rename", rename)
            take_away(target, names, marker)

    with monkeypatch.context() as patch:
        patch.setattr(publish, "_take_away", stopped)
        with pytest.raises(Killed):
            export_to(output, "bf16")
    assert (output / "config.json").exists() == (moved == 0)
    export_to(output, "bf16")
    assert dtypes(output) == {torch.bfloat16}


@pytest.mark.parametrize("made", [True, False])
def test_an_export_through_a_link(
    export_to: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    real, output = tmp_path / "disk" / "real", tmp_path / "out"
    (real if made else real.parent).mkdir(parents=True)
    output.symlink_to(real)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "complete_stage", kill)
        with pytest.raises(Killed):
            export_to(output)
    for dtype, type_made in (("keep", torch.float32), ("bf16", torch.bfloat16)):
        export_to(output, dtype)
        assert output.is_symlink() and output.readlink() == real
        assert dtypes(real) == {type_made}
        assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_an_import_through_a_link(tmp_path: Path, hf: Path, in_this_process: None) -> None:
    real, output = tmp_path / "disk" / "real", tmp_path / "out"
    real.mkdir(parents=True)
    output.symlink_to(real)
    for dtype in ("keep", "bf16"):
        stages.run_stage("import", ImportConfig(hf=hf, output=output, dtype=dtype))
        assert output.is_symlink() and output.readlink() == real
        verify_checkpoint(real)
        assert (real / "stage.json").is_file()
        assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_a_conversion_without_a_stage_through_a_link(
    tmp_path: Path, hf: Path, convert: Imports, export: Imports
) -> None:
    for name, work, source in (("c", convert, hf), ("e", export, tmp_path / "c")):
        real = tmp_path / f"real-{name}"
        real.mkdir()
        (tmp_path / name).symlink_to(real)
        work(source, tmp_path / name)
        assert (tmp_path / name).is_symlink() and (real / "config.json" if name == "e" else real / "hf").exists()
    assert not (tmp_path / ".e.exo-megatron").exists()


def test_an_import_after_one_without_a_stage_that_was_killed(
    tmp_path: Path, hf: Path, convert: Imports, in_this_process: None
) -> None:
    """Right after the rename, the output still has the marker of staging; the files of the stage stay."""
    output = convert(hf, tmp_path / "out")
    (output / publish.STAGING_MARKER).touch()
    stages.run_stage("import", ImportConfig(hf=hf, output=output))
    verify_checkpoint(output)
    assert {path.name for path in output.iterdir()} >= STAGE_FILES
    assert not (output / publish.STAGING_MARKER).exists()


def test_an_import_changed_by_the_user_is_not_replaced(tmp_path: Path, hf: Path, in_this_process: None) -> None:
    output = tmp_path / "out"
    stages.run_stage("import", ImportConfig(hf=hf, output=output))
    (output / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not empty \(hf\)"):
        stages.run_stage("import", ImportConfig(hf=hf, output=output, dtype="bf16"))
    assert (output / "hf" / "notes.txt").read_text() == "mine"


def test_an_export_to_the_working_directory(
    export_to: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for dtype, made in (("keep", torch.float32), ("bf16", torch.bfloat16)):
        export_to(Path(), dtype)
        assert dtypes(Path()) == dtypes(tmp_path / "here") == {made}
    assert Path("config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".here.exo-megatron", "checkpoint", "here", "hf"]
    capsys.readouterr()
    export_to(tmp_path / "here", "bf16")
    assert capsys.readouterr().out.startswith("export: started")  # spelled otherwise, it is another configuration
    export_to(tmp_path / "here", "bf16")
    assert "complete already" in capsys.readouterr().out
