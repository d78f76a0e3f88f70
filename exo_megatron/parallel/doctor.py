"""Checks of this machine: versions, devices, optional parts, an all-reduce of two processes."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

PYTHON_MINIMUM = (3, 11)
ESSENTIALS = {
    "torch": ("torch", ">=2.8"),
    "megatron-core": ("megatron.core", ">=0.16.1,<0.20"),
    "transformers": ("transformers", ">=4.56"),
    "datasets": ("datasets", ">=3"),
    "sentencepiece": ("sentencepiece", ">=0.2"),
    "safetensors": ("safetensors", ">=0.4"),
    "pydantic": ("pydantic", ">=2.7"),
    "PyYAML": ("yaml", ">=6"),
    "numpy": ("numpy", ">=1.26"),
    "psutil": ("psutil", ">=5.9"),
    "tensorboard": ("tensorboard", ">=2.14"),
    "matplotlib": ("matplotlib", ">=3.8"),
    "rich": ("rich", ">=13"),
}
"""Distribution -> (module, versions that setup.py asks for)."""

PROBE_SECONDS = 120.0
COLLECTIVE_SECONDS = 120.0
_FLASH_CAPABILITY = (8, 0)

State = Literal["ok", "active", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. advice: how to install or repair it; empty if not needed."""

    name: str
    state: State
    detail: str
    advice: str = ""


def check_versions() -> list[Finding]:
    """Check Python and the required packages, each of which is imported.

    The program cannot run with one that is `missing` or `broken`.
    """
    version = platform.python_version()
    python_ok = sys.version_info[:2] >= PYTHON_MINIMUM
    wanted = ".".join(map(str, PYTHON_MINIMUM))
    python = Finding("python", "ok" if python_ok else "broken", version, "" if python_ok else f"use Python >= {wanted}")
    return [python, *(_check_package(name, module, wants) for name, (module, wants) in ESSENTIALS.items())]


def check_devices() -> list[Finding]:
    """Describe processors, memory and CUDA devices."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{cores} cores, {memory.total / 2**30:.0f} GiB memory, {memory.available / 2**30:.0f} GiB of it free"
    findings = [Finding("CPU", "ok", cpu)]
    if torch.cuda.is_available():
        return findings + [_describe_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.version.cuda is None and shutil.which("nvidia-smi") is not None:
        detail = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        advice = "install the CUDA build of torch (https://pytorch.org/get-started/locally)"
        return [*findings, Finding("CUDA", "broken", detail, advice)]
    return [*findings, Finding("CUDA", "missing", "no device; everything runs on the CPU with gloo")]


def check_optional_parts() -> list[Finding]:
    """Check the parts that make the program faster or start it in other ways. None is required."""
    return [
        _check_transformer_engine(),
        _check_apex(),
        _check_flash_attention(),
        _check_mpi(),
    ]


def check_collectives() -> list[Finding]:
    """Start two processes that add up a tensor: gloo, and NCCL if there are two CUDA devices."""
    import torch

    findings = [try_collective("gloo")]
    if torch.cuda.is_available() and torch.cuda.device_count() >= 2 and torch.distributed.is_nccl_available():
        findings.append(try_collective("nccl"))
    return findings


def try_collective(backend: Literal["gloo", "nccl"], limit: float = COLLECTIVE_SECONDS) -> Finding:
    """Run one all-reduce over two new processes, which are killed after `limit` seconds."""
    context = multiprocessing.get_context("spawn")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        workers = []
        for rank in range(2):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (rank, backend, str(Path(directory) / "store"), limit, theirs)
            worker = context.Process(target=_reduce, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            workers.append((worker, ours))
        try:
            answers = [_receive(ours, started + limit) for _, ours in workers]
        finally:
            for worker, _ in workers:
                worker.kill()
                worker.join()
    problems = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer != "ok"]
    name = f"{backend}, 2 processes"
    if not problems:
        return Finding(name, "ok", f"all-reduce in {time.monotonic() - started:.1f} s, start of the processes included")
    interface = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
    advice = f"check that this host's name resolves, or name a network interface in {interface}"
    return Finding(name, "broken", "; ".join(problems), advice)


def _reduce(rank: int, backend: str, store: str, limit: float, answers: Connection) -> None:
    """Run one process of `try_collective`, and send "ok" or a description of the failure."""
    import torch
    import torch.distributed as dist

    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=limit)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
        values = torch.full((1024,), float(rank + 1), device=device)
        dist.all_reduce(values)
        right = bool((values == 3).all().item())
        answers.send("ok" if right else f"the sum of 1 and 2 came out as {values[0].item()}")
        dist.destroy_process_group()
    except Exception as error:
        answers.send(_one_line(error))


def _receive(answers: Connection, end: float) -> str:
    try:
        if answers.poll(max(end - time.monotonic(), 0)):
            return str(answers.recv())
    except EOFError:
        return "the process ended without an answer"
    return "no answer within the time limit"


def _check_package(name: str, module: str, wants: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core warns of each optional part; they have their own section
            importlib.import_module(module)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", f"{wants} wanted", f"pip install '{name}{wants}'")
    except Exception as error:
        return Finding(name, "broken", f"{version}: {_one_line(error)}", f"reinstall: pip install '{name}{wants}'")
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(wants, prereleases=True).contains(version):
        return Finding(name, "broken", f"{version}, {wants} wanted", f"pip install '{name}{wants}'")
    return Finding(name, "ok", version)


def _describe_gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {major}.{minor}"
    return Finding(f"CUDA {index}", "ok", detail)


def _check_transformer_engine() -> Finding:
    advice = "pip install --no-build-isolation 'exo-megatron[cuda]' (after torch, with a CUDA toolkit)"
    code = (
        "import importlib.metadata as m, sys; from exo_megatron.parallel.engine import settle_engine; "
        "failure = settle_engine(); print(failure or m.version('transformer-engine'), "
        "file=sys.stderr if failure else sys.stdout); sys.exit(failure is not None)"
    )
    return _probe("Transformer Engine", "transformer_engine", advice, code=code)


def _check_apex() -> Finding:
    """Check for NVIDIA's apex with compiled extensions; `apex` on PyPI is another program."""
    advice = (
        "git clone https://github.com/NVIDIA/apex && "
        "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./apex (not `pip install apex`)"
    )
    if importlib.util.find_spec("amp_C") is not None:
        return _probe("NVIDIA apex", "apex.optimizers", advice, version_of="apex")
    found = importlib.util.find_spec("apex")
    if found is None:
        return Finding("NVIDIA apex", "missing", "not installed; fused Adam and norms", advice)
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    if any((folder / "optimizers").is_dir() for folder in folders):
        detail = "installed without its CUDA extensions"
    else:
        detail = "the installed package apex is not NVIDIA's"
    return Finding("NVIDIA apex", "missing", detail, advice)


def _check_flash_attention() -> Finding:
    """Check torch's own flash kernels, which our attention calls.

    The package flash-attn is used by Transformer Engine only.
    """
    import torch

    name = "flash attention"
    if not torch.cuda.is_available():
        return Finding(name, "active", "torch's CPU kernels")
    if not torch.backends.cuda.is_flash_attention_available():
        return Finding(
            name, "missing", f"torch {torch.__version__} is built without it", "install a usual build of torch"
        )
    weakest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if weakest < _FLASH_CAPABILITY:
        return Finding(name, "missing", f"needs capability 8.0 (A100 or later), have {weakest[0]}.{weakest[1]}")
    return Finding(name, "active", "torch's variable-length CUDA kernels, in bf16")


def _check_mpi() -> Finding:
    """Check for mpi4py with a runtime that it can load, and for mpirun."""
    advice = "pip install 'exo-megatron[mpi]', or mpi4py built against the cluster's MPI"
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    found = _probe("MPI", "mpi4py", advice, code=code)
    beside = Path(sys.executable).parent / "mpirun"
    launcher = shutil.which("mpirun") or (str(beside) if beside.exists() else None)
    if found.state != "active":
        return found
    if launcher is None:
        return Finding("MPI", "missing", f"{found.detail}; no mpirun on the path", advice)
    return Finding("MPI", "active", f"{found.detail}; {launcher}")


def _probe(name: str, module: str, advice: str, *, version_of: str | None = None, code: str | None = None) -> Finding:
    """Import a module in a process of its own, and describe what it finds.

    A compiled extension that does not fit may end the process.

    Args:
        name: name of the finding.
        module: the module to import.
        advice: advice of the finding if the module is missing or broken.
        version_of: distribution whose version is shown; default: `module`.
        code: program that prints one line about what it found; default: it prints that version.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Finding(name, "missing", "not installed", advice)
    distribution = version_of or module
    program = code or f"import {module}, importlib.metadata as m; print(m.version({distribution!r}))"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "broken", f"importing it took more than {PROBE_SECONDS:.0f} s", advice)
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        return Finding(name, "broken", f"installed, but cannot be imported ({lines[-1].strip()})", advice)
    lines = answer.stdout.strip().splitlines() or ["no version"]
    return Finding(name, "active", lines[-1].split(",")[0].strip())


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
