"""Outputs that appear whole or not at all: made beside the target, moved into place, marked last.

A target may already exist and hold the files that the command line writes for a stage
(`config.yaml`, ...), which stay. Other files of the user are never touched: such a target is
refused. So is a directory of the user's that has the name of the staging directory: ours hold, from
their first moment to the last, a file that names the process that makes them.

A stage keeps a record of what it has put into its target, beside its other files. It can so be run
again after an interruption, or with other settings, and replaces what it has made itself.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil

from exo_megatron.checkpoint.directory import MANIFEST_FILE, STAGING_MARKER, STEPS_DIRECTORY, in_the_making
from exo_megatron.config.stages import COMPLETE_FILE, LOCK_FILE, STAGE_FILES
from exo_megatron.errors import CheckpointError
from exo_megatron.utils.files import (
    TEMPORARY_FILES,
    UNTOUCHED_SECONDS,
    fsync_directory,
    is_abandoned,
    read_json,
    write_json,
)

PUBLISHED_FILE = ".published"
"""File in a stage's status directory: name -> time of change of what was moved into the target.

What still has that name and that time is ours to remove; everything else is the user's.
"""

_SAME_START = 5.0
"""Seconds by which two readings of a process's start may differ, as clocks are set."""


def staging_path(target: Path) -> Path:
    """Return the directory for making an output: beside the target, or beside what it links to."""
    place = _place(target)
    return place.parent / f"tmp-{place.name}"


def claim(target: Path, marker: str, status: Path) -> None:
    """Check that `target` may be written, and remove what an earlier run of the stage left there.

    Args:
        target: directory of the output, or a link to it.
        marker: the file that marks such an output as complete.
        status: directory of the stage's files, which may be the target itself.

    Raises:
        CheckpointError: with nothing touched, if the target is a file, is already complete, or
            holds anything that is not ours, and if the place of its staging directory is taken.
    """
    target = _place(target)
    unfinished = in_the_making(target)
    left_behind = set() if unfinished else _left_behind(target, status)
    if unfinished:
        _check_unused(target)
    else:
        _check_target(target, left_behind, marker)
    _check_staging(target)
    remove_tree(staging_path(target))
    if unfinished:
        _empty(target)
    if left_behind:
        _take_away(target, left_behind, marker)
    if not (status / COMPLETE_FILE).exists():
        (status / PUBLISHED_FILE).unlink(missing_ok=True)


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
    # Not by way of a temporary file: nothing must be in the directory before the marker.
    (staging / STAGING_MARKER).write_text(_owner())
    return staging


def publish(staging: Path, target: Path, marker: str, status: Path) -> None:
    """Move a finished output from `staging` to `target`, which `claim` has cleared.

    This is one rename if the target is absent or empty; the output is complete once the staging
    marker has been removed from it. Otherwise, and where the target is the working directory, which
    a rename would replace, the files are moved one by one, `marker` last. If a stage has begun in
    `status`, the record of what is moved is written there first.
    """
    sync_tree(staging)
    target = _place(target)
    names = sorted(_names(staging) - {STAGING_MARKER}, key=lambda name: (name == marker, name))
    if _names(status) & STAGE_FILES:
        write_json(status / PUBLISHED_FILE, {name: _time_of_change(staging / name) for name in names})
    if not _names(target) and not (target.is_dir() and target.samefile(".")):
        os.rename(staging, target)
        fsync_directory(target.parent)
        (target / STAGING_MARKER).unlink()
        fsync_directory(target)
    else:
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


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint. It looks complete as long as it is, and `remove_leftovers` can end the removal."""
    with suppress(OSError):  # a full disk must not be in the way of making room
        (directory / STAGING_MARKER).write_text(_owner())
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    remove_tree(directory)


def remove_leftovers(output: Path, status: Path) -> None:
    """Remove what processes that are gone were writing, or removing, in the output of a stage or beside it.

    That is temporary files, staging directories, and half-removed checkpoints. A checkpoint that was put in
    its place whole, but not yet declared complete, stays and is. Called by one process.
    """
    inside = [child for child in _children(output) if child.is_dir() and not child.is_symlink()]
    for directory in {output, status, *inside}:
        for path in directory.glob(TEMPORARY_FILES):
            if is_abandoned(path):
                path.unlink(missing_ok=True)
    staging = staging_path(output)
    for directory in (staging, *(output / STEPS_DIRECTORY).glob("*step-*")):
        if not in_the_making(directory) or not _is_abandoned(directory):
            continue
        if directory != staging and not directory.name.startswith("tmp-") and (directory / MANIFEST_FILE).is_file():
            (directory / STAGING_MARKER).unlink()
        else:
            remove_tree(directory)


def _is_abandoned(directory: Path) -> bool:
    """Tell whether the process is gone that was making this directory."""
    host, pid = _maker(directory)
    if host in (None, socket.gethostname()):
        return pid is None
    return time.time() - _time_of_change(directory) / 1e9 > UNTOUCHED_SECONDS


def _owner() -> str:
    process = psutil.Process()
    return json.dumps({"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()})


def _place(target: Path) -> Path:
    """Return where an output really is: a link and a path without a name cannot be renamed to."""
    return target.resolve() if target.is_symlink() or target.name in ("", "..") else target


def _empty(target: Path) -> None:
    """Remove an output in the making but for the files of the stage, its marker last."""
    for name in sorted(_names(target) - STAGE_FILES - {LOCK_FILE}, key=lambda name: name == STAGING_MARKER):
        _remove(target / name)


def _take_away(target: Path, names: set[str], marker: str) -> None:
    """Remove what an earlier run made, the marker first, so that no part of it looks complete.

    It goes through the staging directory: after an interruption every name is there as it was, or
    gone, and the record still fits.
    """
    staging = make_staging(target)
    for name in sorted(names, key=lambda name: name != marker):
        os.rename(target / name, staging / name)
    remove_tree(staging)


def _check_target(target: Path, left_behind: set[str], marker: str) -> None:
    if target.exists() and not target.is_dir():
        raise _refuse(target, "is a file", "a directory that is empty or does not exist")
    names = _names(target) - left_behind - STAGE_FILES - {LOCK_FILE, PUBLISHED_FILE}
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
    host, pid = _maker(directory)
    if pid is not None and host == socket.gethostname() and pid != psutil.Process().pid:
        raise CheckpointError(
            str(directory),
            f"is being written by process {pid} of this host",
            expected="one run at a time for an output",
            fix="wait for it to end, or choose another output",
        )


def _maker(directory: Path) -> tuple[str | None, int | None]:
    """Return the host and the number of the process that makes a directory.

    No number: no such process runs here. No host: nobody's, or cut off while it was written.
    """
    try:
        owner = json.loads((directory / STAGING_MARKER).read_text())
        host, pid, started = str(owner["host"]), int(owner["pid"]), float(owner["started"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None, None
    try:
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < _SAME_START
    except psutil.Error:
        alive = False
    return host, pid if alive else None


def _shown(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _names(directory: Path) -> set[str]:
    return {child.name for child in _children(directory)}


def _left_behind(target: Path, status: Path) -> set[str]:
    """List what an incomplete stage has moved here, before it was stopped or is run once more.

    A file that was changed or replaced since then is not listed.
    """
    if (status / COMPLETE_FILE).exists() or not (status / PUBLISHED_FILE).is_file():
        return set()
    record = read_json(status / PUBLISHED_FILE)
    times = record if isinstance(record, dict) else {}
    return {name for name in _names(target) & times.keys() if _time_of_change(target / name) == times[name]}


def _time_of_change(path: Path) -> int:
    """Return when a file, or anything in a directory, was changed last, in nanoseconds; renames keep it."""
    return max(each.lstat().st_mtime_ns for each in (path, *path.rglob("*")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse(target: Path, problem: str, expected: str) -> CheckpointError:
    return CheckpointError(str(target), problem, expected=expected, fix="choose another output, or remove it yourself")
