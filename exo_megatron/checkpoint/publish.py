"""Outputs that appear whole or not at all: made beside the target, moved into place, marked last.

A target may already exist and hold the files that the command line writes for a stage
(`config.yaml`, ...), which stay. Other files of the user are never touched: such a target is
refused. So is a directory of the user's that has the name of the staging directory: ours hold, from
their first moment to the last, a file that names the process that makes them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import psutil

from exo_megatron.checkpoint.directory import STAGING_MARKER, in_the_making
from exo_megatron.config.stages import COMPLETE_FILE, STAGE_FILES
from exo_megatron.errors import CheckpointError
from exo_megatron.utils.files import fsync_directory, read_json, write_json

PUBLISHED_FILE = ".published"
"""File in a target that was not empty: names moved into it, which are ours to remove."""

_SAME_START = 5.0
"""Seconds by which two readings of a process's start may differ, as clocks are set."""


def staging_path(target: Path) -> Path:
    """Return the directory beside the target, on its file system, for making an output."""
    return target.parent / f"tmp-{target.name}"


def claim(target: Path, marker: str) -> None:
    """Check that `target` may be written, and remove what an interrupted run of ours left there.

    marker: the file that marks such an output as complete. Raises CheckpointError, with nothing
    touched, if the target is a file, is already complete, or holds anything that is not ours, and
    if the place of its staging directory is taken.
    """
    unfinished = in_the_making(target)
    left_behind = set() if unfinished else _left_behind(target)
    if unfinished:
        _check_unused(target)
    else:
        _check_target(target, left_behind, marker)
    _check_staging(target)
    remove_tree(staging_path(target))
    if unfinished:
        remove_tree(target)
    # The marker first, so that a partial removal leaves no complete output; the list of names last.
    for name in sorted(left_behind, key=lambda name: (name != marker, name == PUBLISHED_FILE)):
        _remove(target / name)


def clear_staging(target: Path) -> None:
    """Remove the staging directory of `target`, left by an interrupted run of ours or empty.

    Raises CheckpointError, with nothing touched, if something there is not ours, or another process
    is writing it.
    """
    _check_staging(target)
    remove_tree(staging_path(target))


def make_staging(target: Path) -> Path:
    """Make the staging directory of `target`, with the file that names this process.

    The directory must not exist.
    """
    staging = staging_path(target)
    staging.mkdir(parents=True)
    process = psutil.Process()
    owner = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}
    # Not by way of a temporary file: nothing must be in the directory before the marker.
    (staging / STAGING_MARKER).write_text(json.dumps(owner))
    return staging


def publish(staging: Path, target: Path, marker: str) -> None:
    """Move a finished output from `staging` to `target`, which `claim` has cleared.

    This is one rename if the target is absent or empty; the output is complete once the staging
    marker has been removed from it. Otherwise the files are moved one by one, `marker` last.
    """
    sync_tree(staging)
    if not _names(target):
        os.rename(staging, target)
        fsync_directory(target.parent)
        (target / STAGING_MARKER).unlink()
        fsync_directory(target)
    else:
        names = sorted(_names(staging) - {STAGING_MARKER}, key=lambda name: (name == marker, name))
        write_json(target / PUBLISHED_FILE, names)
        for name in names:
            os.rename(staging / name, target / name)
        fsync_directory(target)
        remove_tree(staging)
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
    """Remove a directory if it exists, the staging marker last."""
    for name in _names(path) - {STAGING_MARKER}:
        _remove(path / name)
    if path.is_dir():
        shutil.rmtree(path)


def _check_target(target: Path, left_behind: set[str], marker: str) -> None:
    if target.exists() and not target.is_dir():
        raise _refuse(target, "is a file", "a directory that is empty or does not exist")
    names = _names(target) - left_behind - STAGE_FILES
    if marker in names:
        raise _refuse(target, f"already holds a complete output ({marker})", "an output directory that is empty")
    if names:
        raise _refuse(target, f"is not empty ({_shown(names)})", "an output directory that is empty or does not exist")


def _check_staging(target: Path) -> None:
    staging = staging_path(target)
    expected = f"a free place for making {target.name}"
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        raise _refuse(staging, "is not a directory", expected)
    names = _names(staging)
    if names and not in_the_making(staging):
        raise _refuse(staging, f"holds what no run of ours has made ({_shown(names)})", expected)
    _check_unused(staging)


def _check_unused(directory: Path) -> None:
    """Raise CheckpointError if another running process of this host makes this directory."""
    try:
        owner = json.loads((directory / STAGING_MARKER).read_text())
        host, pid, started = owner["host"], int(owner["pid"]), float(owner["started"])
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < _SAME_START
    except (FileNotFoundError, ValueError, TypeError, KeyError, psutil.Error):
        return  # nobody's, cut off while it was written, or of a process that is gone
    if alive and host == socket.gethostname() and pid != psutil.Process().pid:
        raise CheckpointError(
            str(directory),
            f"is being written by process {pid} of this host",
            expected="one run at a time for an output",
            fix="wait for it to end, or choose another output",
        )


def _shown(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _names(directory: Path) -> set[str]:
    return {child.name for child in directory.iterdir()} if directory.is_dir() else set()


def _left_behind(target: Path) -> set[str]:
    """List what an incomplete stage has moved here, before it was stopped or is run once more."""
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
