"""A rank whose CUDA device is emulated: does the checks of tests/multiprocess/harness.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.emulated_cuda.emulation import install

if __name__ == "__main__":
    install()
    importlib.import_module("tests.multiprocess.harness").work(Path(sys.argv[1]))
