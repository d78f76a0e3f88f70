"""Picture, report and summary."""

from __future__ import annotations

import base64
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from exo_megatron.evaluation.picture import COLOURS, draw_frontier
from exo_megatron.evaluation.report import render_report
from exo_megatron.evaluation.summary import summarize_evaluation
from exo_megatron.utils.files import write_json
from tests.unit.evaluation.records import point, record

ESTIMATES = [
    point("reference", None, 0.1, 0.0),
    point("exo", 8, 1.0, 0.5),
    point("exo", 16, 2.0, 1.5),
    point("dpo", 16, 1.8, 1.2),
]
TEXTS = {"reference": " is <b>dull</b> & long", "exo": " shines", "dpo": ' "works"'}


def pixels(path: Path, colour: str) -> int:
    """How many pixels are of exactly this colour."""
    image = np.rint(matplotlib.image.imread(path)[..., :3] * 255).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == wanted).all(axis=-1).sum())


def test_picture_shows_a_marker_for_every_checkpoint(tmp_path: Path) -> None:
    draw_frontier(ESTIMATES, tmp_path / "both.png")
    draw_frontier(ESTIMATES[:3], tmp_path / "exo.png")
    draw_frontier([ESTIMATES[0], ESTIMATES[2]], tmp_path / "last.png")
    exo, dpo = COLOURS[:2]
    assert pixels(tmp_path / "both.png", dpo) > 50
    assert pixels(tmp_path / "exo.png", dpo) == 0
    assert pixels(tmp_path / "exo.png", exo) > pixels(tmp_path / "last.png", exo) + 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "exo.png", "last.png"]


def test_picture_joins_no_curve_to_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a model are joined to each other; a path from the reference was not measured."""
    drawn: list[Axes] = []
    plot = Axes.plot

    def keep(axes: Axes, *values: Any, **style: Any) -> list[Line2D]:
        drawn.append(axes)
        return plot(axes, *values, **style)

    monkeypatch.setattr(Axes, "plot", keep)
    draw_frontier(ESTIMATES, tmp_path / "frontier.png")
    joined = [line for line in drawn[0].lines if line.get_linestyle() == "-"]
    assert [line.get_xydata().tolist() for line in joined] == [[[0.5, 1.0], [1.5, 2.0]], [[1.2, 1.8]]]
    points = [line.get_xydata().tolist() for line in drawn[0].lines if line.get_marker() == "*"]
    assert points == [[[0.0, 0.1]]], "the reference is shown all the same"


def test_picture_of_the_reference_alone(tmp_path: Path) -> None:
    draw_frontier(ESTIMATES[:1], tmp_path / "frontier.png")
    assert matplotlib.image.imread(tmp_path / "frontier.png").shape[:2] == (720, 1080)


class Page(HTMLParser):
    """The texts of table cells, and every attribute that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.rstrip("\n")


def page(shown_prompts: int) -> Page:
    samples = {
        name: [record(f"p{i}", [float(i), 9.0], prompt=f"prompt{i}", text=text) for i in range(6)]
        for name, text in TEXTS.items()
    }
    text = render_report(
        ESTIMATES, samples, picture=b"PNG!", settings={"data": "<script>alert(1)</script>"}, shown_prompts=shown_prompts
    )
    return Page(text)


def test_report_needs_no_other_file_and_escapes_texts() -> None:
    found = page(2)
    assert found.sources == ["data:image/png;base64," + base64.b64encode(b"PNG!").decode()]
    assert not {"script", "b", "link"} & set(found.tags)
    assert "prompt0 is <b>dull</b> & long" in found.cells
    assert "<script>alert(1)</script>" in found.cells


def test_report_has_a_row_per_checkpoint_and_prompts_spread_over_the_list() -> None:
    found = page(3)
    for each in ESTIMATES:
        start = [
            i for i, cell in enumerate(found.cells) if cell == each.name and found.cells[i + 2] == f"{each.reward:.3f}"
        ]
        assert len(start) == 1
        assert found.cells[start[0] + 1] == ("" if each.step is None else str(each.step))
        assert found.cells[start[0] + 4] == f"{each.kl:.3f}"
    shown = [cell for cell in found.cells if re.fullmatch(r"prompt\d shines", cell)]
    assert shown == ["prompt0 shines", "prompt2 shines", "prompt4 shines"]
    assert len([cell for cell in page(100).cells if cell.endswith(" shines")]) == 6


@pytest.mark.parametrize("reference_step", [None, 400])
def test_summary_takes_the_last_step_of_each_model(tmp_path: Path, reference_step: int | None) -> None:
    estimates = [replace(ESTIMATES[0], step=reference_step), *ESTIMATES[1:]]
    write_json(tmp_path / "evaluation.json", {"settings": {}, "checkpoints": [asdict(each) for each in estimates]})
    summary = summarize_evaluation(tmp_path / "evaluation.json", reference_name="sft")
    assert summary == {
        "sft": {"reward": 0.1, "reward_stderr": 0.08, "kl": 0.0, "kl_stderr": 0.05, "prompts": 8},
        "exo": {"reward": 2.0, "reward_stderr": 0.08, "kl": 1.5, "kl_stderr": 0.05, "prompts": 8},
        "dpo": {"reward": 1.8, "reward_stderr": 0.08, "kl": 1.2, "kl_stderr": 0.05, "prompts": 8},
    }
    assert list(summary) == ["sft", "exo", "dpo"]
