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

UNFINISHED_FILE = ".unfinished"
"""In a target while staged files are moved into it: the list of their names, which are ours to remove."""

STAGE_FILES = frozenset({CONFIG_FILE, STARTED_FILE, COMPLETE_FILE})


def staging_path(target: Path) -> Path:
    """The directory, beside the target and on its file system, where an output is made."""
    return target.parent / f"tmp-{target.name}"


def claim(target: Path, marker: str) -> None:
    """Make sure that the output may be written to `target`, and remove what an interrupted run of ours left there.

    marker: the JSON file that marks the output as complete and has its files' paths as keys of "files".
    Raises CheckpointError if the target is a file, is already complete, or holds anything that is not ours.
    """
    if target.exists() and not target.is_dir():
        raise _refuse(target, "is a file", "a directory that is empty or does not exist")
    remove_tree(staging_path(target))
    if not target.is_dir():
        return
    _clear(target, marker)
    names = {child.name for child in target.iterdir()} - STAGE_FILES
    if marker in names:
        raise _refuse(target, f"already holds a complete output ({marker})", "an output directory that is empty")
    if names:
        shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise _refuse(target, f"is not empty ({shown})", "an output directory that is empty or does not exist")


def publish(staging: Path, target: Path, marker: str) -> None:
    """Move a finished output from `staging` to `target`, which `claim` has cleared.

    One rename if there is no target. Otherwise its files are moved one by one, the marker last.
    """
    sync_tree(staging)
    if not target.exists():
        os.rename(staging, target)
    else:
        names = sorted((child.name for child in staging.iterdir()), key=lambda name: (name == marker, name))
        write_json(target / UNFINISHED_FILE, names)
        for name in names:
            os.rename(staging / name, target / name)
        (target / UNFINISHED_FILE).unlink()
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


def _clear(target: Path, marker: str) -> None:
    """Remove what an interrupted run of ours left in the target, the marker first so that nothing counts as whole."""
    if (target / UNFINISHED_FILE).is_file():
        ours = {marker, UNFINISHED_FILE, *read_json(target / UNFINISHED_FILE)}
    elif _is_abandoned(target) and (target / marker).is_file():
        ours = {marker, *(name.split("/")[0] for name in read_json(target / marker)["files"])}
    else:
        return
    for name in sorted(ours, key=lambda name: (name != marker, name == UNFINISHED_FILE)):
        _remove(target / name)


def _is_abandoned(target: Path) -> bool:
    """Whether a stage was stopped here before it was recorded as complete."""
    return (target / STARTED_FILE).is_file() and not (target / COMPLETE_FILE).exists()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse(target: Path, problem: str, expected: str) -> CheckpointError:
    return CheckpointError(str(target), problem, expected=expected, fix="choose another output, or remove it yourself")
