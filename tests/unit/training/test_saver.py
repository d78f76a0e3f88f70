"""A save beside the training: one at a time, ended by all ranks, its failure raised between two steps."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from exo_megatron.checkpoint.directory import list_steps
from exo_megatron.checkpoint.dist_format import Writing
from exo_megatron.checkpoint.load import load_sharded, verify_but_records
from exo_megatron.checkpoint.save import Save, SmallFiles, begin_save
from exo_megatron.errors import StorageError
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.training.saver import Saver
from tests.unit.checkpoint.conftest import SPEC, hf_files, runtime, sharded
from tests.unit.checkpoint.test_save_load import empty_like

__all__ = ["hf_files", "runtime"]  # fixtures


def begin(root: Path, state: dict[str, Any], hf: Path, runtime: Runtime, step: int) -> Save:
    small = SmallFiles(SPEC, hf, {"step": step})
    target = root / f"step-{step:08d}"
    return begin_save(target, state, small, step=step, kind="training", runtime=runtime, snapshot=True)


def test_what_changes_after_the_beginning_is_not_saved(
    tmp_path: Path, hf_files: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And training goes on while the file is written, however long that takes."""
    go_on, write = Event(), Writing.write

    def slow(self: Writing) -> None:
        go_on.wait()
        write(self)

    monkeypatch.setattr(Writing, "write", slow)
    state, ended = sharded(2.0), []
    saver = Saver(lambda: ended.append(True))
    saver.begin(begin(tmp_path, state, hf_files, runtime, 3))
    assert saver.under_way and saver.writing and not list_steps(tmp_path)
    for name in ("layer0", "layer1", "embedding"):
        state[name].data.fill_(7.0)
    go_on.set()
    saver.end()
    saver.end()  # nothing is under way
    assert not saver.under_way and not saver.writing and ended == [True]
    ((step, path),) = list_steps(tmp_path)
    loaded = load_sharded(path, empty_like(sharded()), verify_but_records(path))
    assert step == 3 and loaded["embedding"].unique().tolist() == [2.0]
    torch.testing.assert_close(loaded["layer1"], torch.arange(6.0, 12.0) * 2, rtol=0, atol=0)


def test_a_failure_of_the_thread_is_raised_at_the_end(
    tmp_path: Path, hf_files: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Writing) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writing, "write", full)
    saver = Saver(lambda: pytest.fail("it is in its place"))
    saver.begin(begin(tmp_path, sharded(), hf_files, runtime, 3))
    with pytest.raises(StorageError, match="No space left"):
        saver.end()
    assert list(tmp_path.glob("*step*")) == []
