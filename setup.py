"""Packaging. Settings of the tools (lint, types, tests, import contracts) are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# NVIDIA Apex is detected when it is there and never asked for: the package of that name on the index is another one.
REQUIRES = [
    "megatron-core>=0.16.1,<0.20",
    "torch>=2.8",
    "transformers>=4.56",
    "tokenizers>=0.21",
    "datasets>=3",
    "pyarrow>=15",  # which datasets needs; zstd
    "sentencepiece>=0.2",
    "protobuf>=4",  # transformers reads SentencePiece models through it
    "jinja2>=3.1",  # chat templates
    "safetensors>=0.4",
    "pydantic>=2.7",
    "annotated-types>=0.6",
    "PyYAML>=6",
    "numpy>=1.26",
    "packaging>=23",
    "psutil>=5.9",  # megatron-core's checkpoints need it and do not say so
    "tensorboard>=2.14",
    "matplotlib>=3.8",
    "rich>=13",
]

EXTRAS = {
    "cuda": ["transformer-engine[pytorch]>=2.9"],
    "mpi": ["mpi4py>=4", "openmpi>=5"],
    "bench": ["trl>=1.16"],  # peers of tools/bench
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff==0.17.5",
        "mypy==2.4.1",
        "import-linter==2.16",
        "types-PyYAML",
        "types-psutil",
    ],
}

KEYWORDS = ["alignment", "EXO", "DPO", "preference optimization", "RLHF", "large language models", "megatron-core"]

# The licence is not among them: license_expression says it, and setuptools refuses both together.
CLASSIFIERS = [
    "Development Status :: 4 - Beta",
    "Environment :: GPU :: NVIDIA CUDA",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]


def read_version() -> str:
    """The version of exo_megatron/__init__.py, without importing the package."""
    match = re.search(r'^__version__ = "([^"]+)"$', (HERE / "exo_megatron" / "__init__.py").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError("exo_megatron/__init__.py does not set __version__")
    return match.group(1)


setup(
    name="exo-megatron",
    version=read_version(),
    description="Alignment of large language models by efficient exact optimization (EXO) on megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="exo-megatron contributors",
    license="Apache-2.0",  # for setuptools before 77, which does not know the next line
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=KEYWORDS,
    classifiers=CLASSIFIERS,
    python_requires=">=3.11",
    packages=find_packages(include=["exo_megatron", "exo_megatron.*"]),
    package_data={"exo_megatron": ["py.typed"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["exo-megatron = exo_megatron.cli.main:main"]},
)
