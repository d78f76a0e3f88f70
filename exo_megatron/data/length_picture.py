"""The picture shows how long prompts, candidates and groups are, beside the limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exo_megatron.data.groups import GroupLengths
from exo_megatron.data.length_report import Counts, LengthLimits
from exo_megatron.utils.files import atomic_open

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40
FARTHEST = 2.5
"""A limit that is more times as long as the longest text is told, not drawn: the bars would shrink to a line."""
BAR_COLOUR, LIMIT_COLOUR = "#56B4E9", "#D55E00"


def draw_lengths(lengths: GroupLengths, limits: LengthLimits, path: Path) -> None:
    """Write a PNG with a histogram each of prompts, candidates and groups of at least one group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    _draw(panels[0], "prompts", lengths.prompts, "data.max_prompt_tokens", limits.prompt)
    _draw(panels[1], "candidates", lengths.candidates, "data.max_completion_tokens", limits.candidate)
    _draw(panels[2], "groups", lengths.tokens, "compute.max_tokens_per_microbatch", limits.microbatch)
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png")


def _draw(axes: Axes, name: str, values: Counts, key: str, limit: int) -> None:
    longest = int(values.max())
    drawn = limit <= FARTHEST * longest
    width = -(-longest // BINS)
    axes.hist(values, bins=(longest + 0.5 - width * np.arange(BINS, -1, -1)).tolist(), color=BAR_COLOUR)
    if drawn:
        axes.axvline(limit, color=LIMIT_COLOUR, linewidth=1.3, linestyle="--")
    axes.set_xlim(0, 1.08 * max(longest, limit if drawn else 0))
    axes.set_title(f"{key}\n= {limit:,}" + ("" if drawn else ", farther right"), color=LIMIT_COLOUR, fontsize=9)
    axes.set_xlabel(f"tokens of {name} (longest {longest:,})")
    axes.set_ylabel(name)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
