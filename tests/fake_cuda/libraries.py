"""Builds the two C++ files of this folder, which make the CPU build of torch accept tensors on "cuda"."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
MEGATRON_CORE = "0.16.1"
ENVIRONMENT = HERE.parents[1] / "tools" / "environment.sh"


@dataclass(frozen=True)
class Libraries:
    """accelerator: to be preloaded. folder: has the module exo_fake_cuda_device, to be imported."""

    accelerator: Path
    folder: Path


def reason_to_skip() -> str | None:
    """Why the cases of this folder cannot be judged here; None if they can."""
    reason = reason_without_device()
    if reason is None and version("megatron-core") != MEGATRON_CORE:
        return f"the figures are those of megatron-core {MEGATRON_CORE}, this is {version('megatron-core')}"
    return reason


def reason_without_device() -> str | None:
    """Why a CUDA device cannot be made here; None if it can."""
    pinned = re.search(r"^EXO_CPU_TORCH=(\S+)$", ENVIRONMENT.read_text(), re.MULTILINE)
    if pinned is None:
        raise LookupError(f"{ENVIRONMENT} names no EXO_CPU_TORCH")
    if shutil.which("g++") is None:
        return "fake CUDA needs g++, which is not installed"
    if torch.version.cuda is not None or torch.__version__.partition("+")[0] != pinned[1]:
        return f"fake CUDA is made for the CPU build of torch {pinned[1]}, this is torch {torch.__version__}"
    return None


def folder_of_run(temporary: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a test run share."""
    base = temporary.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "libraries"
    folder.mkdir(exist_ok=True)
    return folder


def build(folder: Path, **modules: Path) -> Libraries:
    """Compile both, and the C++ files of further Python modules by their names, unless another worker has.

    folder: that of the run.
    """
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder, modules)


def _build(folder: Path, modules: Mapping[str, Path]) -> Libraries:
    root = Path(torch.__file__).parent
    libraries = Libraries(folder / "libexo_fake_cuda_accelerator.so", folder)
    common = [
        *("g++", "-std=c++20", "-O0", "-shared", "-fPIC"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in (root / "include", sysconfig.get_paths()["include"])),
    ]
    linked = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    commands = {libraries.accelerator: [*common, str(HERE / "accelerator.cpp"), "-ldl"]}
    for name, source in {"exo_fake_cuda_device": HERE / "device.cpp", **modules}.items():
        commands[folder / f"{name}.so"] = [*common, str(source), *linked]
    missing = [[*command, "-o", str(library)] for library, command in commands.items() if not library.exists()]
    compilers = [(command, subprocess.Popen(command)) for command in missing]
    for command, code in [(command, compiler.wait()) for command, compiler in compilers]:
        if code:
            raise subprocess.CalledProcessError(code, command)
    return libraries
