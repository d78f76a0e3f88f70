"""The environment that results of checks belong to: versions and the device."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from exo_megatron import __version__
from exo_megatron.parallel.runtime import Runtime

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "transformers")


def describe_environment(runtime: Runtime) -> dict[str, str | int | None]:
    """Describe versions, the device of this rank, and the number of ranks; None for what is absent."""
    packages = {name: _version(name) for name in PACKAGES}
    return {
        "exo-megatron": __version__,
        "python": platform.python_version(),
        **packages,
        "cuda": torch.version.cuda,
        "processes": runtime.world_size,
        **_describe_device(runtime.device),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_device(device: torch.device) -> dict[str, str | int | None]:
    if device.type != "cuda":
        return {"device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"}
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "device": properties.name,
        "capability": capability,
        "device_bytes": properties.total_memory,
        # NVIDIA's containers may allow TF32, with which fp32 is not fp32: "highest" does not.
        "fp32_products": torch.get_float32_matmul_precision(),
    }
