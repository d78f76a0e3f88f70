"""A Transformer Engine that cannot be used is told in one line, and megatron-core goes without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exo_megatron.parallel import doctor

ROOT = Path(__file__).parents[3]

# Files of the fake package, and what is said of it. The last two can be imported, but lack what megatron-core asks for.
BROKEN: dict[str, tuple[dict[str, str], str]] = {
    "assertion": ({"__init__": "raise AssertionError('versions 2.1 and 2.4')"}, "AssertionError: versions 2.1 and 2.4"),
    "no text": ({"__init__": "assert False"}, "AssertionError: AssertionError"),
    "lines": ({"__init__": "raise ImportError('one\\ntwo')"}, "ImportError: one two"),
    "its torch part": (
        {"__init__": "__version__ = '2.4.0'", "pytorch/__init__": "raise OSError('lib.so: undefined symbol: x')"},
        "OSError: lib.so: undefined symbol: x",
    ),
    "runtime": ({"__init__": "import torch\nraise RuntimeError('CUDA driver')"}, "RuntimeError: CUDA driver"),
    "no tensors": (
        {"__init__": "__version__ = '2.4.0'", "pytorch/__init__": ""},
        "ModuleNotFoundError: No module named 'transformer_engine.pytorch.tensor'",
    ),
    "no autocast": (
        {
            "__init__": "__version__ = '0.9.0'",
            "pytorch/__init__": "",
            "pytorch/float8_tensor": "class Float8Tensor: pass",
            "pytorch/fp8": "class FP8GlobalStateManager: pass",
        },
        "ImportError: megatron-core does not find the parts of it that it needs",
    ),
}

# A short way to the model through everything that imports megatron-core, as a stage does.
PROGRAM = """
import warnings
warnings.simplefilter("ignore")
from exo_megatron.parallel.runtime import distributed_runtime
for again in range(2):
    with distributed_runtime() as runtime:
        from exo_megatron.models.policy import build_policy
        from exo_megatron.training import optimizer
        from exo_megatron.checkpoint import save
        from megatron.core.extensions import transformer_engine
        print("HAVE_TE", transformer_engine.HAVE_TE)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / "transformer_engine" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize("kind", BROKEN)
def test_the_run_goes_on_without_it_and_says_so_once(tmp_path: Path, kind: str) -> None:
    files, why = BROKEN[kind]
    write(tmp_path, files)
    ended = run(tmp_path, "-c", PROGRAM)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n") == ["HAVE_TE False", "HAVE_TE False", ""]
    assert [line for line in ended.stderr.splitlines() if "Transformer Engine" in line] == [
        f"exo-megatron: Transformer Engine cannot be used ({why}); "
        "this run takes slower kernels; see `exo-megatron doctor`"
    ]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("kind", ["assertion", "its torch part", "no autocast"])
def test_doctor_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    files, why = BROKEN[kind]
    write(tmp_path, files)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor._check_transformer_engine()
    assert (found.state, found.detail) == ("broken", f"installed, but cannot be imported ({why})")
    assert "exo-megatron[cuda]" in found.advice


@pytest.mark.parametrize("command", ["verify", "pickles"])
def test_commands_that_are_no_stage(tmp_path: Path, command: str) -> None:
    """They get to the error of their own: there is no checkpoint."""
    write(tmp_path, BROKEN["assertion"][0])
    keys = {"verify": ["hf=nowhere", "checkpoint=nowhere"], "pickles": ["hf=nowhere", "output=made"]}[command]
    ended = run(tmp_path, "-m", "exo_megatron", command, *keys)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "nowhere" in ended.stderr.splitlines()[-1]


def test_a_broken_megatron_core_is_not_blamed_on_it(tmp_path: Path) -> None:
    """Without Transformer Engine there is no line, and nothing is imported for its sake."""
    program = (
        "import sys; from exo_megatron.parallel import runtime; print(runtime._engine_failure()); "
        "print(any(name.startswith('megatron') for name in sys.modules))"
    )
    ended = run(tmp_path, "-c", program)
    assert ended.stdout.split() == ["None", "False"]
