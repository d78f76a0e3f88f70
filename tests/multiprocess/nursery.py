"""A process that has imported what checks need. Ranks are forked from it: the imports take 10 s of a core for each.

Reads a line of JSON for every group, {"environments": one per rank, "folder": of its checks, "seconds": their time},
and answers with a line when the group has ended: null, or what went wrong. Ends with its input.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from tests.multiprocess.harness import REPOSITORY, wait_group

MODULES = [
    *(f"exo_megatron.stages.{name}" for name in ("align", "evaluate", "export_hf", "import_hf", "rollout", "verify")),
    "transformers.models.llama.modeling_llama",
]
PARENT_DEATH_SIGNAL = 1


class ForkedRank:
    """One rank, with what `wait_group` asks of a process."""

    def __init__(self, folder: Path, rank: int, environment: Mapping[str, str]) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _become_rank(folder, rank, environment)
                importlib.import_module("tests.multiprocess.harness").work(folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        """The exit code, once it has ended."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def _become_rank(folder: Path, rank: int, environment: Mapping[str, str]) -> None:
    """In the child: a session of its own, output to folder/rankN.log, the rank's environment."""
    os.setsid()
    _end_with_parent()
    log, nothing = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), os.open(os.devnull, 0)
    for source, descriptor in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def main() -> None:
    _end_with_parent()
    importlib.import_module("exo_megatron.parallel.cpu_backend").install()
    for name in MODULES:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        ranks = [ForkedRank(folder, rank, each) for rank, each in enumerate(request["environments"])]
        print(json.dumps(wait_group(ranks, request["seconds"])), flush=True)


if __name__ == "__main__":
    main()
