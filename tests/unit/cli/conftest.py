"""A world of one process without torch, and stage functions that record their calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exo_megatron.cli import stages
from exo_megatron.config.stages import StageConfig


class LoneRuntime:
    """What the command line uses of `Runtime`, for a world of one."""

    rank = 0
    world_size = 1
    is_main = True
    device = SimpleNamespace(type="cpu")

    def barrier(self) -> None:
        pass

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


@dataclass
class Calls:
    """Names of the output directories of the stages that ran, in order; `actions` are done in the middle of a stage."""

    names: list[str] = field(default_factory=list)
    actions: dict[str, Callable[[StageConfig], None]] = field(default_factory=dict)

    def record(self, config: StageConfig, runtime: LoneRuntime) -> None:
        name = config.output.name
        self.names.append(name)
        assert (config.output / "config.yaml").exists()
        assert not (config.output / "stage.json").exists()
        self.actions.get(name, lambda config: None)(config)
        (config.output / "result").write_text(name)

    def take(self) -> list[str]:
        """The names since the last call."""
        names, self.names = self.names, []
        return names


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    @contextmanager
    def distributed_runtime() -> Iterator[LoneRuntime]:
        yield LoneRuntime()

    runtime_module = ModuleType("exo_megatron.parallel.runtime")
    runtime_module.distributed_runtime = distributed_runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exo_megatron.parallel.runtime", runtime_module)
    stage_module = ModuleType("recorded_stages")
    stage_module.record = calls.record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recorded_stages", stage_module)
    for stage in stages.STAGE_FUNCTIONS:
        monkeypatch.setitem(stages.STAGE_FUNCTIONS, stage, "recorded_stages:record")
    return calls
