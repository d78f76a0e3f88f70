"""What `evaluate` says before it loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exo_megatron.config.stages import EvaluateConfig
from exo_megatron.stages import evaluate
from tests.unit.conftest import LoneRuntime


class PlanMade(Exception):
    """Raised in place of what follows the plan."""


class SecondRank(LoneRuntime):
    rank = 1
    world_size = 2
    is_main = False


def test_another_temperature_than_that_of_the_training_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*given: object) -> None:
        raise PlanMade

    class Planned:
        def __str__(self) -> str:
            return "plan"

        def digests(self) -> dict[str, str]:
            return {}

    def describe(plan: Planned, temperature: float) -> str | None:
        return None if temperature == 0.8 else f"{plan} differs from {temperature}"

    monkeypatch.setattr(evaluate, "make_plan", lambda config, tell, team: Planned())
    monkeypatch.setattr(evaluate, "describe_disagreement", describe)
    monkeypatch.setattr(evaluate, "build_reward", stop)

    def told(runtime: Any, temperature: float) -> str:
        config = EvaluateConfig.model_validate(
            {
                "output": Path("o"),
                "models": {"exo": "e"},
                "reference": {"checkpoint": "r"},
                "data": {"path": "d"},
                "reward": {"function": "a:b"},
                "sampling": {"temperature": temperature},
            }
        )
        with pytest.raises(PlanMade):
            evaluate.run_evaluate(config, runtime)
        return capsys.readouterr().out

    assert told(LoneRuntime(), 1.0) == "evaluate: plan differs from 1.0\n"
    assert told(SecondRank(), 1.0) == ""
    assert told(LoneRuntime(), 0.8) == ""
