"""Builds what a process with an emulated CUDA device needs, and says how to start one."""

from __future__ import annotations

import os
from pathlib import Path

from tests.fake_cuda import libraries
from tests.multiprocess.harness import REPOSITORY, Worker


def build_worker(folder: Path) -> Worker:
    """Compile the libraries into `folder`; the worker loads them."""
    built = libraries.build(folder, exo_emulated_cuda_memory=Path(__file__).with_name("memory.cpp"))
    paths = [str(REPOSITORY), str(built.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "LD_PRELOAD": str(built.accelerator),
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCH_COMPILE_DISABLE": "1",  # megatron-core compiles its activations; there is no compiler for this device
    }
    return Worker("tests.emulated_cuda.worker", environment)
