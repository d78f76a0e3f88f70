"""Pictures of benchmarks: panels side by side, one line per side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exo_megatron.evaluation.picture import COLOURS, MARKERS
from exo_megatron.utils.files import atomic_open

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Line:
    """One side: its name and its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One quantity of all sides. label: with its unit."""

    label: str
    lines: Sequence[Line]


def draw_panels(path: Path, title: str, x_label: str, panels: Sequence[Panel]) -> None:
    """Write a PNG to be read at the width of a README.

    Axes begin at 0, so that a straight line through the origin is a constant ratio.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _draw(axes, panel)
        axes.set_xlabel(x_label)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png")


@dataclass(frozen=True)
class Bars:
    """One case: names and lengths of its bars, from above to below."""

    title: str
    values: Sequence[tuple[str, float]]


def draw_bars(path: Path, title: str, cases: Sequence[Bars]) -> None:
    """Write a PNG of cases in two columns, each with its bars and their values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(cases) // 2)
    figure = Figure(figsize=(10.5, 0.6 + 2.2 * lines), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(lines, 2, squeeze=False)
    half = [cases[:lines], cases[lines:]]
    for column, side in enumerate(half):
        for line in range(lines):
            if line < len(side):
                _draw_case(panels[line][column], side[line])
            else:
                panels[line][column].axis("off")
    _save(figure, path)


def _draw_case(axes: Axes, case: Bars) -> None:
    names, values = zip(*case.values, strict=True)
    ours = ["ours" in name for name in names]
    drawn = axes.barh(range(len(values)), values, color=[COLOURS[0] if mine else "#9a9a9a" for mine in ours])
    axes.bar_label(drawn, labels=[f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(case.title, fontsize=9, loc="left")
    axes.set_xlim(0, 1.12 * max(values))
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(axes: Axes, panel: Panel) -> None:
    for i, line in enumerate(panel.lines):
        axes.plot(line.x, line.y, color=COLOURS[i], marker=MARKERS[i], markersize=5, linewidth=1.6, label=line.name)
    axes.set_xticks(panel.lines[0].x)
    axes.set_ylabel(panel.label)
    axes.margins(x=0.06, y=0.1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.lines) > 1:
        axes.legend(frameon=False, loc="upper left")
