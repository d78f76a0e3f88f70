"""The pictures of the report, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from exo_megatron.evaluation.estimates import PromptMeans, standard_error
from exo_megatron.evaluation.picture import COLOURS, MARKERS
from frontier.figures import OPTIMUM, Paths
from frontier.findings import Lead, Runs, Setting, curves, setting_of, settings_of
from frontier.sweep import METHODS
from frontier.theorems import Cosine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"exo_rw": "EXO", "dpo_rw": "DPO"}
STYLES = {method: (COLOURS[i], MARKERS[i]) for i, method in enumerate(METHODS)}
PANEL = (3.2, 2.8)
"""Inches of one panel."""

MODES_KL, TAIL_KL = 2.0, 0.7
"""KL at which the policies of Figures 1 and 3 are compared."""


def draw_frontiers(runs: Runs, references: Mapping[str, PromptMeans], policy: str) -> bytes:
    """Reward against KL of all end points of a policy: a line per rank, a column per K."""
    mine = [setting for setting in settings_of(runs) if setting.policy == policy]
    ranks, sizes = list(dict.fromkeys(s.rank for s in mine)), list(dict.fromkeys(s.K for s in mine))
    figure = _figure(len(ranks), len(sizes))
    for axes, (rank, K) in zip(figure.axes, ((rank, K) for rank in ranks for K in sizes), strict=True):
        setting = Setting(policy, rank, K)
        for method in METHODS:
            _draw_method(axes, runs, references[policy], setting, method)
        axes.set_title(f"K = {K}" if rank is None else f"rank {rank}, K = {K}", fontsize=9)
        axes.set_xlabel("KL (nats)")
        axes.set_ylabel("reward")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def _draw_method(axes: Axes, runs: Runs, reference: PromptMeans, setting: Setting, method: str) -> None:
    colour, marker = STYLES[method]
    for seed in dict.fromkeys(run.seed for run in runs if setting_of(run) == setting):
        for curve in curves(runs, reference, setting, method, seed):
            kls, rewards = np.array(sorted((each.kls.mean(), each.rewards.mean()) for each in curve)).T
            roots = np.linspace(0, kls[-1] ** 0.5, 100)  # linear over the root, as in equal_kl
            axes.plot(roots**2, np.interp(roots, kls**0.5, rewards), color=colour, linewidth=0.8, alpha=0.5)
    mine = [each for run, each in runs.items() if setting_of(run) == setting and run.method == method]
    axes.errorbar(
        [each.kls.mean() for each in mine],
        [each.rewards.mean() for each in mine],
        xerr=[standard_error(each.kls) for each in mine],
        yerr=[standard_error(each.rewards) for each in mine],
        color=colour, marker=marker, markersize=3.5, linestyle="none", elinewidth=0.8, label=NAMES[method],
    )  # fmt: skip


def draw_leads(leads: Sequence[Lead], policy: str) -> bytes:
    """EXO's lead at every end point of DPO, over its KL, with intervals; a panel per rank."""
    mine = [lead for lead in leads if lead.run.policy == policy]
    ranks = list(dict.fromkeys(lead.run.rank for lead in mine))
    figure = _figure(1, len(ranks), panel=(4.6, 3.4))
    for axes, rank in zip(figure.axes, ranks, strict=True):
        axes.axhline(0, color="#888888", linewidth=0.8)
        for place, K in enumerate(dict.fromkeys(lead.run.K for lead in mine)):
            points = [
                (lead.kl, lead.lead.value, lead.lead.value - lead.lead.low, lead.lead.high - lead.lead.value)
                for lead in mine
                if lead.run.rank == rank and lead.run.K == K and lead.lead is not None
            ]
            if points:
                kls, values, below, above = np.array(points).T
                axes.errorbar(
                    kls, values, yerr=np.maximum([below, above], 0), color=COLOURS[place], marker=MARKERS[place],
                    markersize=4, linestyle="none", elinewidth=0.8, label=f"K = {K}",
                )  # fmt: skip
        axes.set_title("" if rank is None else f"rank {rank}", fontsize=9)
        axes.set_xlabel("KL of DPO's end point (nats)")
        axes.set_ylabel("reward of EXO minus DPO")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def draw_cosines(found: Sequence[Cosine]) -> bytes:
    """Cosine with the exact gradient over K, mean and range over problems; a panel per pair of betas."""
    betas = list(dict.fromkeys((each.beta_pi, each.beta_r) for each in found))
    figure = _figure(1, len(betas))
    for axes, (beta_pi, beta_r) in zip(figure.axes, betas, strict=True):
        for method in METHODS:
            colour, marker = STYLES[method]
            by_K: dict[int, list[float]] = {}
            for each in found:
                if (each.beta_pi, each.beta_r, each.method) == (beta_pi, beta_r, method):
                    by_K.setdefault(each.K, []).append(each.cosine)
            means = [np.mean(values) for values in by_K.values()]
            axes.plot(list(by_K), means, color=colour, marker=marker, markersize=4, label=NAMES[method])
            lows, highs = ([limit(values) for values in by_K.values()] for limit in (min, max))
            axes.fill_between(list(by_K), lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_title(f"beta_pi {beta_pi:g}, beta_r {beta_r:g}", fontsize=9)
        axes.set_xlabel("K")
        axes.set_ylabel("cosine with the exact gradient")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def draw_modes(paths: Paths) -> bytes:
    """Figure 1: mass on the better mode, the other one and in between, at the end of a run and at one KL."""
    names = ("better mode", "other mode", "between")
    figure = _figure(1, 2, panel=(4.6, 3.4))
    ends = {key: [path.values[name][-1] for name in names] for key, path in paths.items() if key[0] != OPTIMUM}
    level = {key: [path.at_kl(name, MODES_KL) for name in names] for key, path in paths.items()}
    for axes, bars, title in zip(
        figure.axes, (ends, level), ("at the end of the run", f"at KL {MODES_KL:g}"), strict=True
    ):
        _draw_bars(axes, bars, names)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("probability")
    return _png(figure)


def draw_tail(paths: Paths) -> bytes:
    """Figure 3: mass on fifths of pi_sft's outputs by likelihood, at one KL."""
    names = tuple(f"fifth {number}" for number in range(5))
    figure = _figure(1, 1, panel=(7.0, 3.4))
    axes = figure.axes[0]
    _draw_bars(axes, {key: [path.at_kl(name, TAIL_KL) for name in names] for key, path in paths.items()}, names)
    axes.axhline(0.2, color="#888888", linewidth=0.8)
    axes.set_xticklabels(["least likely", "", "", "", "most likely"])
    axes.set_title(f"outputs by likelihood under pi_sft (line: pi_sft itself), at KL {TAIL_KL:g}", fontsize=9)
    axes.set_ylabel("probability")
    return _png(figure)


def _draw_bars(axes: Axes, bars: Mapping[tuple[str, int | None], Sequence[np.ndarray]], names: Sequence[str]) -> None:
    """A group of bars per name: means over worlds that have a value, standard errors as lines."""
    width = 0.8 / len(bars)
    shades = {None: 0.5, 8: 0.55, 32: 1.0}
    for place, ((method, K), values) in enumerate(bars.items()):
        known = [value[~np.isnan(value)] for value in values]
        axes.bar(
            np.arange(len(names)) + (place - (len(bars) - 1) / 2) * width,
            [value.mean() if len(value) else 0.0 for value in known],
            width,
            yerr=[standard_error(value) if len(value) > 1 else 0.0 for value in known],
            color="#777777" if method == OPTIMUM else STYLES[method][0],
            alpha=shades[K],
            error_kw={"elinewidth": 0.8},
            label="pi*" if method == OPTIMUM else f"{NAMES[method]}, K = {K}",
        )
    axes.set_xticks(np.arange(len(names)), names)
    axes.legend(frameon=False, fontsize=7)


def _figure(lines: int, columns: int, *, panel: tuple[float, float] = PANEL) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel[0] * columns, panel[1] * lines), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes in np.ravel(figure.subplots(lines, columns)):
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
