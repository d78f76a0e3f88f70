"""Outputs that appear whole or not at all: staged beside the target, moved into place, marked last.

A target may already exist and hold the files that the command line writes for a stage (`config.yaml`, ...), which
stay. Whatever else a user has there is never touched: the target is refused.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from exo_megatron.errors import CheckpointError
from exo_megatron.utils.files import fsync_directory, read_json, write_json
from exo_megatron.utils.stages import COMPLETE_FILE, CONFIG_FILE, STARTED_FILE

PUBLISHED_FILE = ".published"
"""In a target that was not empty: the names of what was moved into it, which are ours to remove."""

STAGE_FILES = frozenset({CONFIG_FILE, STARTED_FILE, COMPLETE_FILE})


def staging_path(target: Path) -> Path:
    """The directory, beside the target and on its file system, where an output is made."""
    return target.parent / f"tmp-{target.name}"


def claim(target: Path, marker: str) -> None:
    """Make sure that an output may be written to `target`, and remove what an interrupted run of ours left there.

    marker: the file that marks such an output as complete.
    Raises CheckpointError if the target is a file, is already complete, or holds anything that is not ours.
    """
    if target.exists() and not target.is_dir():
        raise _refuse(target, "is a file", "a directory that is empty or does not exist")
    left_behind = _left_behind(target)
    names = _names(target) - left_behind - STAGE_FILES
    if marker in names:
        raise _refuse(target, f"already holds a complete output ({marker})", "an output directory that is empty")
    if names:
        shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise _refuse(target, f"is not empty ({shown})", "an output directory that is empty or does not exist")
    remove_tree(staging_path(target))
    # The marker first, so that nothing that is left counts as whole; the list of names last.
    for name in sorted(left_behind, key=lambda name: (name != marker, name == PUBLISHED_FILE)):
        _remove(target / name)


def publish(staging: Path, target: Path, marker: str) -> None:
    """Move a finished output from `staging` to `target`, which `claim` has cleared.

    One rename if the target is absent or empty. Otherwise the files are moved one by one, the marker last.
    """
    sync_tree(staging)
    if not _names(target):
        os.rename(staging, target)
    else:
        names = sorted(_names(staging), key=lambda name: (name == marker, name))
        write_json(target / PUBLISHED_FILE, names)
        for name in names:
            os.rename(staging / name, target / name)
        staging.rmdir()
        fsync_directory(target)
    fsync_directory(target.parent)


def sync_tree(root: Path) -> None:
    """Flush all files and directories below `root` to the disk."""
    for path in [*root.rglob("*"), root]:
        if path.is_dir():
            fsync_directory(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it; nothing happens if there is none."""
    if path.is_dir():
        shutil.rmtree(path)


def _names(directory: Path) -> set[str]:
    return {child.name for child in directory.iterdir()} if directory.is_dir() else set()


def _left_behind(target: Path) -> set[str]:
    """What a stage moved here before it was stopped, or before it is run once more."""
    if (target / COMPLETE_FILE).exists() or not (target / PUBLISHED_FILE).is_file():
        return set()
    return {PUBLISHED_FILE, *read_json(target / PUBLISHED_FILE)} & _names(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse(target: Path, problem: str, expected: str) -> CheckpointError:
    return CheckpointError(str(target), problem, expected=expected, fix="choose another output, or remove it yourself")
