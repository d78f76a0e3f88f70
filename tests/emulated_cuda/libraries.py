"""Builds what a process with an emulated CUDA device needs, and says how to start one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.emulated_cuda.engine import FOLDER, VERSION
from tests.fake_cuda import libraries
from tests.multiprocess.harness import REPOSITORY, Worker


def fetch_engine(folder: Path) -> str | None:
    """Unpack the Python of Transformer Engine, a wheel without compiled parts, into `folder`; returns what fails."""
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    try:
        subprocess.run(
            [*wheel, f"transformer-engine=={VERSION}"], check=True, timeout=60, capture_output=True, text=True
        )
    except subprocess.SubprocessError as error:
        return f"transformer-engine {VERSION} cannot be fetched: {error}"
    for path in folder.glob("transformer_engine-*.whl"):
        shutil.unpack_archive(path, folder, "zip")
    return None


def with_engine(worker: Worker, folder: Path) -> Worker:
    """The worker with Transformer Engine's Python in `folder`."""
    return Worker(worker.module, {**worker.environment, FOLDER: str(folder)})


def build_worker(folder: Path) -> Worker:
    """Compile the libraries into `folder`, that of the run; the worker loads them."""
    built = libraries.build(folder, exo_emulated_cuda_memory=Path(__file__).with_name("memory.cpp"))
    paths = [str(REPOSITORY), str(built.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "LD_PRELOAD": str(built.accelerator),
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCH_COMPILE_DISABLE": "1",  # megatron-core compiles its activations; there is no compiler for this device
    }
    return Worker("tests.emulated_cuda.worker", environment)
