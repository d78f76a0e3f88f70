"""A device without memory: the settings to lower are named with their values, and it is not the user's input."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exo_megatron.cli.main import main
from exo_megatron.config.stages import STAGE_CONFIGS, StageConfig
from exo_megatron.stages.memory import out_of_memory
from tests.unit.conftest import Calls

RUNTIME: Any = SimpleNamespace(rank=3, device="cuda:1")
MODEL = {"model": {"checkpoint": "m"}}
DATA = {"data": {"path": "d"}}
REWARD = {"reward": {"function": "a:b"}}
TOKENS = "compute.max_tokens_per_microbatch (now 8192)"
CANDIDATES = "sampling.max_active_candidates (now 256)"
ADVICE = [
    ("sft", MODEL | DATA, f"lower {TOKENS}; set compute.recompute=full; raise parallel.tensor or parallel.pipeline"),
    ("align", MODEL | DATA | {"compute": {"recompute": "full"}}, f"lower {TOKENS}; raise parallel.tensor or"),
    ("rollout", MODEL | DATA, f"lower {CANDIDATES} or {TOKENS}; raise parallel.tensor or"),
    ("score", {"candidates": "c"} | REWARD, "lower reward.batch_size (now 32)"),
    (
        "evaluate",
        {"models": {"a": "m"}, "reference": {"checkpoint": "m"}} | DATA | REWARD,
        f"lower {CANDIDATES}, {TOKENS} or reward.batch_size (now 32); raise parallel.tensor or",
    ),
    ("import", {"hf": "h"}, "end what else uses this device"),
]


def config_of(stage: str, settings: dict[str, Any]) -> StageConfig:
    return STAGE_CONFIGS[stage].model_validate({"output": "o", **settings})


@pytest.mark.parametrize(("stage", "settings", "advice"), ADVICE, ids=[stage for stage, _, _ in ADVICE])
def test_the_settings_are_named(stage: str, settings: dict[str, Any], advice: str) -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 1 has a total capacity of 9 GiB"
    )
    told = out_of_memory(error, config_of(stage, settings), RUNTIME)
    assert told is not None and told.exit_code == 1
    assert told.where.startswith("rank 3 on ") and told.where.endswith(", cuda:1")
    assert told.problem == "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 9 GiB"
    assert told.fix.startswith(advice)


def test_want_of_memory_without_an_exception_of_its_own() -> None:
    config = config_of("score", {"candidates": "c"} | REWARD)
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**55, dtype=torch.uint8)
    for error in (real.value, MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")):
        assert out_of_memory(error, config, RUNTIME) is not None
    assert out_of_memory(RuntimeError("shape '[2]' is invalid"), config, RUNTIME) is None


def test_a_stage_ends_with_one_line_and_another_code_than_for_wrong_input(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def allocate(config: StageConfig) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    calls.actions["out"] = allocate
    code = main(["sft", f"output={tmp_path / 'out'}", "model.checkpoint=m", "data.path=d"])
    err = capsys.readouterr().err
    assert code == 1
    assert err.startswith("exo-megatron: rank 0 on ") and err.count("\n") == 1
    assert TOKENS in err
