"""Runs each case in a process of its own, forked from one that has imported everything.

The importing process gets a line of JSON for every case and answers with the path of the result. Only that process
has the libraries of this folder, and with them a CUDA device.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from tests.fake_cuda.cases import Case
from tests.fake_cuda.libraries import Libraries

REPOSITORY = Path(__file__).resolve().parents[2]
CASE_SECONDS = 120.0


class CaseFailure(AssertionError):
    """A case did not complete; the message ends with the traceback."""


class Server:
    """The importing process, from the side of the tests."""

    def __init__(self, libraries: Libraries, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        paths = [str(REPOSITORY), str(libraries.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"LD_PRELOAD": str(libraries.accelerator), "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
        )

    def find(self, case: Case, sabotage: str | None = None) -> Any:
        """The `Found` of a case, as a namespace; raises CaseFailure."""
        self._number += 1
        result = self._folder / f"{self._number:03d}-{case.name}.json"
        stdin, stdout = _pipes(self._process)
        print(json.dumps({"case": asdict(case), "sabotage": sabotage, "result": str(result)}), file=stdin, flush=True)
        code = stdout.readline().strip()
        log = result.with_suffix(".log").read_text() if result.with_suffix(".log").exists() else "the server has ended"
        if code != "0" or not result.exists():
            raise CaseFailure(f"{case.name} ended with {code or 'nothing'}\n{log}")
        return SimpleNamespace(**json.loads(result.read_text()))

    def close(self) -> None:
        """End the importing process."""
        _pipes(self._process)[0].close()
        self._process.wait()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise ValueError("the server was started without pipes")
    return process.stdin, process.stdout


def _serve() -> None:
    """Answer every line of the input with the exit code of a process that does what it says."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in ("device", "collectives"):
        importlib.import_module(f"tests.fake_cuda.{module}").install()
    importlib.import_module("tests.fake_cuda.work")
    gc.freeze()  # the processes of the cases collect nothing of what is imported, and so copy none of it
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_work(Case(**order["case"]), order["sabotage"], Path(order["result"])))
        print(_exit_code(child), file=answers, flush=True)


def _exit_code(child: int) -> int:
    deadline = time.monotonic() + CASE_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _work(case: Case, sabotage: str | None, result: Path) -> int:
    log = os.open(result.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        importlib.import_module("tests.fake_cuda.watch").watch_reads()
        if sabotage is not None:
            vars(importlib.import_module("tests.fake_cuda.sabotage"))[sabotage]()
        found = importlib.import_module("tests.fake_cuda.work").find(case)
        result.write_text(json.dumps(asdict(found)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    _serve()
    os._exit(0)  # nothing is left to do, and the interpreter's own end takes seconds
