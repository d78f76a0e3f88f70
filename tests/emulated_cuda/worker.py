"""A rank whose CUDA device is emulated: does the checks of tests/multiprocess/harness.py."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from tests.emulated_cuda import emulation, engine

if __name__ == "__main__":
    emulation.install()
    if engine.FOLDER in os.environ:
        engine.install(Path(os.environ[engine.FOLDER]))
    importlib.import_module("tests.multiprocess.harness").work(Path(sys.argv[1]))
