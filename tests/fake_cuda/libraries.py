"""Builds the two C++ files of this folder, which make the CPU build of torch accept tensors on "cuda"."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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
    """Why fake CUDA cannot be made here; None if it can."""
    pinned = re.search(r"^EXO_CPU_TORCH=(\S+)$", ENVIRONMENT.read_text(), re.MULTILINE)
    if pinned is None:
        raise LookupError(f"{ENVIRONMENT} names no EXO_CPU_TORCH")
    if shutil.which("g++") is None:
        return "fake CUDA needs g++, which is not installed"
    if torch.version.cuda is not None or torch.__version__.partition("+")[0] != pinned[1]:
        return f"fake CUDA is made for the CPU build of torch {pinned[1]}, this is torch {torch.__version__}"
    if version("megatron-core") != MEGATRON_CORE:
        return f"the figures are those of megatron-core {MEGATRON_CORE}, this is {version('megatron-core')}"
    return None


def build(folder: Path) -> Libraries:
    """Compile both into `folder`, unless they are there."""
    root = Path(torch.__file__).parent
    libraries = Libraries(folder / "libexo_fake_cuda_accelerator.so", folder)
    common = [
        *("g++", "-std=c++20", "-O0", "-shared", "-fPIC"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in (root / "include", sysconfig.get_paths()["include"])),
    ]
    module = folder / "exo_fake_cuda_device.so"
    linked = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    for source, target, options in (
        ("accelerator.cpp", libraries.accelerator, ["-ldl"]),
        ("device.cpp", module, linked),
    ):
        if not target.exists():
            subprocess.run([*common, str(HERE / source), "-o", str(target), *options], check=True)
    return libraries
