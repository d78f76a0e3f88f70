"""The plot of reward against KL, that is, of the gain of a policy against its distance moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exo_megatron.evaluation.estimates import REFERENCE_NAME, Estimate
from exo_megatron.utils.files import atomic_open

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people can tell apart. The markers help without
# colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_frontier(estimates: Sequence[Estimate], path: Path) -> None:
    """Write a PNG with one line per model over its steps, and standard errors as bars.

    The reference is a point by itself: what a model did before its first saved step is not known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    references = [each for each in estimates if each.name == REFERENCE_NAME]
    names = list(dict.fromkeys(each.name for each in estimates if each.name != REFERENCE_NAME))
    for index, name in enumerate(names):
        line = [each for each in estimates if each.name == name]
        _draw_line(axes, name, line, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
    for each in references:
        axes.errorbar(
            each.kl, each.reward, yerr=each.reward_stderr, color="black", marker="*", markersize=11, capsize=3,
            linestyle="none", label=REFERENCE_NAME, zorder=4,
        )  # fmt: skip
    axes.set_xlabel("KL(policy ‖ reference) of whole completions (nats)")
    axes.set_ylabel("mean reward")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.1)
    axes.legend(frameon=False, loc="best")
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png")


def _draw_line(axes: Axes, name: str, line: Sequence[Estimate], colour: str, marker: str) -> None:
    kl = [each.kl for each in line]
    reward = [each.reward for each in line]
    axes.plot(kl, reward, color=colour, linewidth=1.3, alpha=0.6, zorder=2)
    axes.errorbar(
        kl,
        reward,
        xerr=[each.kl_stderr for each in line],
        yerr=[each.reward_stderr for each in line],
        color=colour, marker=marker, markersize=5, linestyle="none", capsize=2, elinewidth=0.9, zorder=3,
        label=_legend(name, line),
    )  # fmt: skip


def _legend(name: str, points: Sequence[Estimate]) -> str:
    """Return name and steps: ``exo, steps 24 to 96``."""
    steps = [each.step for each in points if each.step is not None]
    if not steps:
        return name
    return f"{name}, step {steps[0]}" if len(steps) == 1 else f"{name}, steps {steps[0]} to {steps[-1]}"
