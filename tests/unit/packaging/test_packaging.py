from __future__ import annotations

import ast
import importlib
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "megatron", "transformers", "datasets", "numpy", "matplotlib")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """What setup.py tells setuptools."""
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", seen.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    return seen


def test_every_folder_with_code_is_packaged(metadata: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "exo_megatron").rglob("*.py")}
    assert set(metadata["packages"]) == {".".join(folder.parts) for folder in folders}


def test_requirements(metadata: dict[str, Any]) -> None:
    required = {requirement.name: requirement for requirement in map(Requirement, metadata["install_requires"])}
    extras = [Requirement(text).name for texts in metadata["extras_require"].values() for text in texts]
    assert "apex" not in {*required, *extras}  # on the index, another package has that name
    megatron = required["megatron-core"].specifier
    assert megatron.contains("0.16.1")
    assert megatron.contains("0.19.2")
    assert not megatron.contains("0.16.0")
    assert not megatron.contains("0.20.0")
    assert set(metadata["extras_require"]) == {"bench", "cuda", "mpi", "dev"}


def test_imported_packages_are_required(metadata: dict[str, Any]) -> None:
    """Top-level third-party imports of the package are in install_requires (or an extra, where they are optional)."""
    names = {"PyYAML": "yaml", "megatron-core": "megatron", "protobuf": "google"}
    optional = {"mpi4py", "transformer_engine", "flash_attn", "apex", "vllm", "openmpi"}
    required = {Requirement(text).name for text in metadata["install_requires"]}
    modules = {names.get(name, name.replace("-", "_")) for name in required}
    for path in (ROOT / "exo_megatron").rglob("*.py"):
        imported = top_level_imports(path) - set(sys.stdlib_module_names) - {"exo_megatron"} - optional
        assert imported <= modules, f"{path}: {imported - modules} not in install_requires"


def top_level_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_console_script_names_a_function(metadata: dict[str, Any]) -> None:
    (script,) = metadata["entry_points"]["console_scripts"]
    name, target = script.replace(" ", "").split("=")
    module, function = target.split(":")
    assert name == "exo-megatron"
    assert callable(vars(importlib.import_module(module))[function])


def test_help_works_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from exo_megatron.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        f"print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "heavy: []"
    for stage in ("sft", "rollout", "score", "align", "evaluate", "run", "doctor"):
        assert stage in answer.stdout


def test_module_entry_does_nothing_in_a_spawned_helper() -> None:
    """megatron-core's checkpoint writer spawns helpers, which import the main module again under another name."""
    runpy.run_module("exo_megatron.__main__", run_name="__mp_main__")


def test_version_is_the_packages(metadata: dict[str, Any]) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "exo_megatron", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.split()[-1] == metadata["version"]
