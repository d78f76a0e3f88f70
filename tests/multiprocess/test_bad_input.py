"""What bad input gets: one line that names place, problem, expectation and fix, and exit code 2, early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from exo_megatron.checkpoint.directory import make_manifest, read_manifest, record_files, write_manifest
from tests.multiprocess.bad_input_checks import Told
from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.reference.tiny_llama import save_hf, tiny_config, tiny_llama

GOOD = {"prompt": "w4 w5", "completions": [" w6 w7", " w8"], "rewards": [1.0, 0.0]}


@dataclass(frozen=True)
class Case:
    """A stage that must be refused. `lines`: the data file. `says`: what the message must hold."""

    name: str
    says: tuple[str, ...]
    lines: tuple[Any, ...] = (GOOD,)
    settings: tuple[str, ...] = ()
    stage: str = "align"
    world_size: int = 1
    early: bool = True


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


CASES = [
    Case("unknown_key", ("optimizer.lrr", "lr"), settings=("optimizer.lrr=1",)),
    Case("wrong_type", ("batch.groups", "many"), settings=("batch.groups=many",)),
    Case(
        "topology",
        ("tensor 2 x pipeline 2 = 4", "world size 2"),
        settings=("parallel.tensor=2", "parallel.pipeline=2"),
        world_size=2,
    ),
    Case("heads", ("parallel.tensor", "8 does not divide", "4 attention heads"), settings=("parallel.tensor=8",)),
    Case("kv_heads", ("4 does not divide", "2 key/value heads"), settings=("parallel.tensor=4",)),
    Case("layers", ("parallel.pipeline", "3 does not divide", "4 layers"), settings=("parallel.pipeline=3",)),
    Case("malformed_json", ("data.jsonl:2",), lines=(GOOD, '{"prompt": "w4"')),
    Case("missing_field", ("data.jsonl:1", "completions"), lines=(_without("completions"),)),
    Case("misspelt_field", ("data.jsonl:1", "rewards"), lines=(_without("rewards") | {"reward": [1, 0]},)),
    Case("empty_completion", ("data.jsonl:1", "empty"), lines=(GOOD | {"completions": [" w6", ""]},)),
    Case("candidate_count", ("data.jsonl:1", "2", "3"), settings=("candidates=3",)),
    Case("one_candidate", ("data.jsonl:1",), lines=(GOOD | {"completions": [" w6"], "rewards": [1.0]},)),
    Case("long_prompt", ("data.max_prompt_tokens", "2"), settings=("data.max_prompt_tokens=1",)),
    Case(
        "row_too_short", ("compute.max_tokens_per_microbatch = 4",), settings=("compute.max_tokens_per_microbatch=4",)
    ),
    Case(
        "nan_reward",
        ("data.jsonl:1", "rewards[0]", "nan"),
        lines=('{"prompt": "w4", "completions": [" w5", " w6"], "rewards": [NaN, 1]}',),
    ),
    Case("tie", ("data.jsonl:1",), lines=(GOOD | {"rewards": [1.0, 1.0]},), settings=("loss.kind=exo_pref",)),
    Case("no_checkpoint", ("nowhere",), settings=("model.checkpoint=nowhere",)),
    Case("other_shape", ("embedding.word_embeddings.weight",), settings=("model.checkpoint=reshaped",), early=False),
    Case("bin_weights", ("pytorch_model.bin", "safetensors"), settings=("hf=bin", "output=converted"), stage="import"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Told]:
    """Run all cases, one group of processes per world size."""
    root = tmp_path_factory.mktemp("bad_input")
    save_hf(tiny_llama(tiny_config(), seed=3), root / "hf")
    _pickled(root / "hf", root / "bin")
    outcomes: dict[str, Outcome] = {}
    convert = Check(
        "convert",
        "tests.multiprocess.bad_input_checks:run_badly",
        {"stage": "import", "overrides": [f"hf={root / 'hf'}", f"output={root / 'good'}"]},
    )
    outcomes |= run_checks(1, [convert], root / "convert")
    assert outcomes["convert"].values()[0].exit_code == 0
    _reshaped(root / "good", root / "reshaped")
    for size in sorted({case.world_size for case in CASES}):
        checks = [_check(case, root) for case in CASES if case.world_size == size]
        outcomes |= run_checks(size, checks, root / f"world{size}")
    return lambda name: outcomes[name].values()[0]


def _check(case: Case, root: Path) -> Check:
    folder = root / case.name
    folder.mkdir()
    lines = [line if isinstance(line, str) else json.dumps(line) for line in case.lines]
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    standard = [
        f"model.checkpoint={root / 'good'}",
        f"data.path={folder / 'data.jsonl'}",
        f"output={folder / 'out'}",
        "compute.precision=fp32",
        "batch.groups=1",
    ]
    own = [_rooted(setting, root) for setting in case.settings]
    overrides = [*(standard if case.stage == "align" else []), *own]
    arguments = {"stage": case.stage, "overrides": overrides}
    return Check(case.name, "tests.multiprocess.bad_input_checks:run_badly", arguments)


def _rooted(setting: str, root: Path) -> str:
    """Paths in settings are relative to the test's directory."""
    key, _, value = setting.partition("=")
    return f"{key}={root / value}" if key in ("model.checkpoint", "hf", "output") else setting


def _pickled(source: Path, target: Path) -> None:
    """An HF directory with pickled weights only."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    torch.save({}, target / "pytorch_model.bin")


def _reshaped(source: Path, target: Path) -> None:
    """A checkpoint whose model.json asks for a larger vocabulary than its tensors have."""
    shutil.copytree(source, target)
    spec = json.loads((target / "model.json").read_text())
    (target / "model.json").write_text(json.dumps(spec | {"vocab_size": spec["vocab_size"] + 128}))
    files = {**read_manifest(target).files, **record_files(target, ["model.json"])}
    write_manifest(target, make_manifest(files, step=None, kind="model"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line(case: Case, told: Callable[[str], Told]) -> None:
    """Exit code 2, one line, every part of the message, and no model built where that could be known before."""
    answer = told(case.name)
    assert answer.exit_code == 2
    for part in (*case.says, "; expected ", "; fix: "):
        assert part in answer.message
    assert "\n" not in answer.message
    if case.early:
        assert not answer.built_model
