"""The rollout stage around its engine: units of shards, what a restart keeps, and what a process has in memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.config.stages import RolloutConfig
from exo_megatron.data import shards
from exo_megatron.data.candidates import Candidate, CandidateRecord
from exo_megatron.data.prepared import Prepared
from exo_megatron.data.prompts import Prompt
from exo_megatron.errors import DataError
from exo_megatron.rollout import units
from exo_megatron.rollout.draw import DrawnCandidates
from exo_megatron.stages import rollout
from exo_megatron.utils.files import read_json
from tests.reference.candidates import read_candidates
from tests.reference.prepared import prepared_prompts
from tests.unit.conftest import LoneRuntime

K = 2
PER_SHARD = 4


class Engine:
    """Stands for the policy: candidates are functions of seed and prompt. `fails_at`: the call that raises."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.length = 1
        self.fails_at: int | None = None

    def draw(
        self, policy: Any, prompts: Sequence[Prompt], sampling: Any, *, seed: int, runtime: Any, progress: Any
    ) -> DrawnCandidates:
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append([prompt.id for prompt in prompts])
        progress.advance(K * len(prompts))
        ids = [tuple(range(seed + 7, seed + 7 + self.length)) for _ in prompts]
        records = [
            CandidateRecord(prompt.id, prompt.text, prompt.ids, (Candidate("t", tuple(each), True, -1.0),) * K)
            for prompt, each in zip(prompts, ids, strict=True)
        ]
        return DrawnCandidates(records, 1 / (1 + int(prompts[0].id)))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Shards of PER_SHARD prompts; a unit is two of them."""
    engine = Engine()

    @contextmanager
    def model_parallel(*arguments: Any, **named: Any) -> Iterator[Any]:
        yield SimpleNamespace(data_size=1, data_rank=0)

    tokenizer = SimpleNamespace(path="t", digest="t", stop_ids={2}, absent_ids=[], vocab_size=100)
    source = SimpleNamespace(spec=SimpleNamespace(max_positions=10**6), fingerprint="f", path=Path("model"))
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", PER_SHARD)
    monkeypatch.setattr(units, "FILLS", 1)
    monkeypatch.setattr(rollout, "find_policy", lambda *arguments: source)
    monkeypatch.setattr(rollout, "find_tokenizer", lambda *arguments: tokenizer)
    monkeypatch.setattr(rollout, "load_policy", lambda s, topology, *arguments: SimpleNamespace(topology=topology))
    monkeypatch.setattr(rollout, "load_prompts", lambda config, *a, **n: prompts(int(config.path)))
    monkeypatch.setattr(rollout, "model_parallel", model_parallel)
    monkeypatch.setattr(rollout, "draw_candidates", engine.draw)
    return engine


def prompts(count: int) -> Prepared[Prompt]:
    return prepared_prompts([Prompt(str(n), f"text {n}", (1, 5)) for n in range(count)])


def config(output: Path, count: int, **named: Any) -> RolloutConfig:
    sampling = {"candidates": K, "max_active_candidates": 2 * PER_SHARD * K, **named.pop("sampling", {})}
    settings = {"output": output, "model": {"checkpoint": "m"}, "data": {"path": str(count)}, "sampling": sampling}
    return RolloutConfig.model_validate({**settings, **named})


def run(config: RolloutConfig, runtime: Any = None) -> None:
    rollout.run_rollout(config, LoneRuntime() if runtime is None else runtime)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_unit_costs_its_slots_one_drain() -> None:
    sampling = SamplingConfig(candidates=8, max_active_candidates=256)
    assert units.plan_units(48, sampling, 1) == [range(n, n + 1) for n in range(48)]
    # 16 x 16 model copies x 256 slots / 8 candidates = 8192 prompts.
    assert units.plan_units(20, sampling, 16) == [range(8), range(8, 16), range(16, 20)]


def test_units_are_drawn_in_order_and_written_as_shards(engine: Engine, tmp_path: Path) -> None:
    run(config(tmp_path, 19))
    assert [len(asked) for asked in engine.asked] == [8, 8, 3]
    names = sorted(path.name for path in (tmp_path / "candidates").glob("*.jsonl"))
    assert names == [f"shard-0000{n}-of-00005.jsonl" for n in range(5)]
    assert [record.id for record in read_candidates(tmp_path)] == [str(n) for n in range(19)]
    described = read_json(tmp_path / "rollout.json")
    assert described["prompts"] == 19
    assert described["decoding_difference"] == 1.0, "that of the first unit, the largest"


def test_progress_goes_on_over_units_and_starts(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.fails_at = 1
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path, 19))
    assert "rollout: 16/38 candidates  42%" in capsys.readouterr().err
    engine.fails_at = None
    run(config(tmp_path, 19))
    assert "rollout: 38/38 candidates  100%" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["none", "truncated", "no checksum"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(engine: Engine, tmp_path: Path, damage: str) -> None:
    run(config(tmp_path / "whole", 19))
    engine.asked, engine.fails_at = [], 2
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "cut", 19))
    assert not (tmp_path / "cut" / "rollout.json").exists()
    with pytest.raises(DataError, match=r"shard-00004-of-00005\.jsonl: is missing"):
        read_candidates(tmp_path / "cut")
    first = tmp_path / "cut" / "candidates" / "shard-00001-of-00005.jsonl"
    if damage == "truncated":
        first.write_bytes(first.read_bytes()[:-1])
    if damage == "no checksum":
        Path(f"{first}.sha256").unlink()
    (first.parent / f".{first.name}.tmp-7").write_text("what a killed process was writing")
    engine.asked, engine.fails_at = [], None
    run(config(tmp_path / "cut", 19))
    assert [asked[0] for asked in engine.asked] == (["16"] if damage == "none" else ["0", "16"])
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_without_anything_left_no_model_is_loaded(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(tmp_path, 19))
    before = files(tmp_path)
    (tmp_path / "rollout.json").unlink()
    monkeypatch.setattr(rollout, "load_policy", None)
    run(config(tmp_path, 19))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"sampling": {"temperature": 0.5}},
        {"sampling": {"stop": ["x"]}},
        {"compute": {"precision": "fp32"}},
        {"data": {"path": "18"}},
    ],
)
def test_other_settings_and_prompts_draw_anew(engine: Engine, tmp_path: Path, change: dict[str, Any]) -> None:
    """Also where the number of shards, and so their names, stay."""
    run(config(tmp_path / "changed", 19))
    engine.asked = []
    run(config(tmp_path / "changed", 19, **change))
    assert len(engine.asked) == 3
    run(config(tmp_path / "fresh", 19, **change))
    assert files(tmp_path / "changed") == files(tmp_path / "fresh")


def test_what_changes_no_draw_keeps_them(engine: Engine, tmp_path: Path) -> None:
    run(config(tmp_path, 19))
    engine.asked = []
    run(config(tmp_path, 19, sampling={"max_active_candidates": 5}, parallel={"tensor": 2}))
    assert engine.asked == []


def test_every_rank_writes_shards_of_its_own(engine: Engine, tmp_path: Path) -> None:
    class Second(LoneRuntime):
        rank, world_size, is_main = 1, 2, False

        def broadcast_object(self, value: Any, source: int = 0) -> Any:
            return {}, None  # rank 0 found nothing finished, and no error

    (tmp_path / "candidates").mkdir()  # as rank 0 does
    run(config(tmp_path, 19), Second())
    names = sorted(path.name for path in (tmp_path / "candidates").glob("*.jsonl"))
    assert names == ["shard-00001-of-00005.jsonl", "shard-00003-of-00005.jsonl"]
    assert not (tmp_path / "rollout.json").exists()


def test_ranks_with_other_prompts_are_refused(engine: Engine, tmp_path: Path) -> None:
    class Runtime(LoneRuntime):
        def gather_objects(self, value: Any) -> list[Any]:
            host, seen = value
            return [value, value, (host, {**seen, "prompts": "other"})]

    with pytest.raises(DataError, match=r"rank 2, .*: reads something else than rank 0 \(.*\) as prompts;"):
        run(config(tmp_path, 19), Runtime())
    assert not engine.asked


def test_memory_does_not_grow_with_the_number_of_units(engine: Engine, tmp_path: Path) -> None:
    engine.length = 500
    peaks = []
    for count in (16, 96):
        gc.collect()
        tracemalloc.start()
        run(config(tmp_path / str(count), count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    more = (96 - 16) * 500 * 8  # the ids of all candidates that are more; those of a prompt are one tuple here
    assert peaks[1] < peaks[0] + more / 2
