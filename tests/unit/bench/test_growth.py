"""The growth of costs: that it runs and draws, and that it sees gradients that differ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from exo_megatron.data.groups import Group
from tools.bench import growth
from tools.bench.options import Options
from tools.bench.pictures import Line, Panel, draw_panels
from tools.bench.sides import Different

PNG = b"\x89PNG"


def quick(pictures: Path) -> Options:
    return Options(quick=True, rounds=1, pictures=pictures)


def test_quick_run_compares_and_draws(tmp_path: Path) -> None:
    pictures = tmp_path / "not" / "there yet"
    table = growth.run(quick(pictures))
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["K 1", "K 3", "vocabulary 199", "vocabulary 311", "groups 1", "groups 2"]
    # 20 tokens of the prompt and 8 of each candidate; two groups do not fit into one micro-batch.
    assert [row[1] for row in table.rows] == ["28", "44", "44", "44", "44", "88"]
    assert all(0 < float(rows[name][-1]) < 1e-5 for name in ("K 3", "vocabulary 311"))
    assert float(rows["K 1"][6]) == 1.0  # alone, a candidate is its own group
    assert float(rows["K 3"][6]) > 1.2  # memory: three prompts instead of one
    assert sorted(path.name for path in pictures.iterdir()) == [
        "quick-growth-groups.png",
        "quick-growth-k.png",
        "quick-growth-vocabulary.png",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in pictures.iterdir())


def test_gradients_that_differ_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The separate sequences get another weight for one candidate."""
    separate = growth.unshared

    def other_weight(groups: Sequence[Group]) -> list[Group]:
        found = separate(groups)
        return [*found[:-1], replace(found[-1], rewards=((found[-1].rewards or (0.0,))[0] * 1.01 + 0.01,))]

    monkeypatch.setattr(growth, "unshared", other_weight)
    with pytest.raises(Different, match="relative difference"):
        growth.run(quick(tmp_path))
    assert not list(tmp_path.iterdir())


def test_points_are_in_the_order_of_the_sweep_whatever_the_models() -> None:
    for sweep in growth.full_sweeps(growth.Point(growth.quick_sweeps()[0].points[0][1].shape)):
        models = [(point.shape, point.max_tokens) for _, point in sweep.points]
        # `measure` takes model after model; equal ones must be neighbours.
        assert len(dict.fromkeys(models)) == 1 + sum(a != b for a, b in itertools.pairwise(models))
        values = [value for value, _ in sweep.points]
        assert values == sorted(set(values))


def test_picture_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    draw_panels(path, "title", "x", [Panel("y, s", [Line("groups", [1, 2], [1.0, 2.0])])] * 2)
    assert path.read_bytes().startswith(PNG)
