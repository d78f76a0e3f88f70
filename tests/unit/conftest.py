"""A world of one process without a process group, and stage functions that record their calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exo_megatron.config.stages import StageConfig, status_directory
from exo_megatron.stages import run as stages
from exo_megatron.utils.team import ALONE, Team

# As the run.sh of each example does with PYTHONPATH.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


class LoneRuntime:
    """What stages are run with of `Runtime`, for a world of one."""

    rank = 0
    world_size = 1
    is_main = True
    device = SimpleNamespace(type="cpu")

    def begin(self, what: str) -> None:
        pass

    def barrier(self) -> None:
        pass

    def team(self) -> Team:
        return ALONE

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return value

    def broadcast_items(self, items: Sequence[Any]) -> list[Any]:
        return list(items)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def gather_items(self, items: Sequence[Any]) -> list[Any]:
        return list(items)


@dataclass
class Rank:
    """One rank of a world; `others` are the values that further ranks contribute, `sent` what rank 0 broadcast."""

    rank: int = 0
    others: list[Any] = field(default_factory=list)
    sent: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def world_size(self) -> int:
        return self.rank + 1 + len(self.others)

    def begin(self, what: str) -> None:
        pass

    def team(self) -> Team:
        return replace(ALONE, rank=self.rank, size=self.rank + 1, share=lambda value: [value] * (self.rank + 1))

    def gather_objects(self, value):
        return [value, *self.others] if self.is_main else None

    def broadcast_object(self, value, source=0):
        if self.is_main:
            self.sent = value
        return self.sent


@dataclass
class Calls:
    """Names of the output directories of the stages that ran, in order; `actions` are done in the middle of a stage."""

    names: list[str] = field(default_factory=list)
    actions: dict[str, Callable[[StageConfig], None]] = field(default_factory=dict)

    def record(self, config: StageConfig, runtime: LoneRuntime) -> None:
        name = config.output.name
        self.names.append(name)
        status = status_directory(config)
        assert (status / "config.yaml").exists()
        assert not (status / "stage.json").exists()
        self.actions.get(name, lambda config: None)(config)
        config.output.mkdir(exist_ok=True)  # which an export's is not yet
        (config.output / "result").write_text(name)

    def take(self) -> list[str]:
        """The names since the last call."""
        names, self.names = self.names, []
        return names


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    @contextmanager
    def distributed_runtime(*limits: object) -> Iterator[LoneRuntime]:
        yield LoneRuntime()

    monkeypatch.setattr(stages, "distributed_runtime", distributed_runtime)
    stage_module = ModuleType("recorded_stages")
    stage_module.record = calls.record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recorded_stages", stage_module)
    for stage in stages.STAGE_FUNCTIONS:
        monkeypatch.setitem(stages.STAGE_FUNCTIONS, stage, "recorded_stages:record")
    return calls
