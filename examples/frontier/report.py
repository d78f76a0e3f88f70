"""What the example leaves: summary.json, findings.json, report.html with its pictures, and lines to print."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import Path

import numpy as np

from exo_megatron.evaluation.equal_kl import COVERAGE, Bounded
from exo_megatron.evaluation.estimates import PromptMeans, standard_error
from exo_megatron.evaluation.report import STYLE
from exo_megatron.utils.files import write_json, write_text
from frontier import pictures, stages
from frontier.figures import OPTIMUM, Paths
from frontier.findings import AtKl, Lead, describe, effect_of_K, find_leads
from frontier.sweep import METHODS, Run
from frontier.work import Results

EXPERIMENT = "two modes"
EFFECT_KL = 1.0
"""KL at which the effect of K is shown."""

LEVEL, LEVEL_OF_STAGES = 1.5, 0.5
"""KL from which on a verdict is told; runs through the stages go less far."""

StageRuns = tuple[dict[Run, PromptMeans], PromptMeans]


def write_report(output: Path, source: str, results: Results, staged: StageRuns | None) -> str:
    """Write all files; return the findings in words."""
    if staged is not None:
        references = {**results.references, stages.POLICY: staged[1]}
        results = replace(results, runs={**results.runs, **staged[0]}, references=references)
    leads = find_leads(results.runs, results.references)
    effects = effect_of_K(results.runs, results.references, kl=EFFECT_KL)
    write_json(output / "summary.json", [end_point(run, means) for run, means in results.runs.items()])
    write_json(
        output / "findings.json",
        {
            "source": source,
            "references": {name: {"reward": float(each.rewards.mean())} for name, each in results.references.items()},
            "leads": [{**asdict(each), "errors": each.errors} for each in leads],
            "effect_of_K": [asdict(each) for each in effects],
            "theorem_3_1": [asdict(each) for each in results.errors],
            "cosines": [asdict(each) for each in results.cosines],
            "figure_1": describe_paths(results.modes, pictures.MODES_KL),
            "figure_3": describe_paths(results.tail, pictures.TAIL_KL),
        },
    )
    in_stages = [lead for lead in leads if lead.run.policy == stages.POLICY]
    sentences = [
        *describe([lead for lead in leads if lead not in in_stages], from_kl=LEVEL),
        *describe(in_stages, from_kl=LEVEL_OF_STAGES),
        *describe_toys(results),
    ]
    write_text(output / "report.html", render(source, results, leads, effects, sentences))
    return "\n".join(["", f"Texts: {source}", *sentences, "", f"report      {output / 'report.html'}"])


def end_point(run: Run, means: PromptMeans) -> dict[str, object]:
    """One entry of summary.json."""
    return {
        "experiment": EXPERIMENT,
        "policy": run.policy,
        "rank": run.rank,
        "K": run.K,
        "method": run.method,
        "beta_pi": run.beta_pi,
        "beta_r": run.beta_r,
        "lr": run.lr,
        "seed": run.seed,
        "reward": float(means.rewards.mean()),
        "reward_stderr": standard_error(means.rewards),
        "kl": float(means.kls.mean()),
        "kl_stderr": standard_error(means.kls),
    }


def describe_paths(paths: Paths, kl: float) -> list[dict[str, object]]:
    """Means over worlds at one KL and at the end of each path."""
    return [
        {
            "method": method,
            "K": K,
            "kl": kl,
            "worlds": int((~np.isnan(path.at_kl("kl", kl))).sum()),
            "at_kl": {name: float(np.nanmean(path.at_kl(name, kl))) for name in path.values},
            "at_end": {name: float(values[-1].mean()) for name, values in path.values.items()},
        }
        for (method, K), path in paths.items()
    ]


def describe_toys(results: Results) -> list[str]:
    """Sentences on the theorems and on Figures 1 and 3."""
    worst = max(each.error for each in results.errors)
    lines = [f"Theorem 3.1: the maximum of the generalised objective is pi*_beta, to {worst:.0e} in log-probs."]
    for beta_pi, beta_r in dict.fromkeys((each.beta_pi, each.beta_r) for each in results.cosines):
        for method in METHODS:
            mine = [e for e in results.cosines if (e.beta_pi, e.beta_r, e.method) == (beta_pi, beta_r, method)]
            by_K = {K: np.mean([each.cosine for each in mine if each.K == K]) for K in dict.fromkeys(e.K for e in mine)}
            lines.append(
                f"Cosine of {pictures.NAMES[method]}'s gradient with its exact one (beta_pi {beta_pi:g}, beta_r "
                f"{beta_r:g}): " + ", ".join(f"{value:.3f} at K = {K}" for K, value in by_K.items()) + "."
            )
    ends = {key: path.values["between"][-1].mean() for key, path in results.modes.items() if key[0] != OPTIMUM}
    lines.append("Figure 1, probability that is left between the two modes at the end: " + _list(ends) + ".")
    tails = {key: np.nanmean(path.at_kl("fifth 0", pictures.TAIL_KL)) for key, path in results.tail.items()}
    lines.append(
        f"Figure 3, probability of the fifth of pi_sft's least likely outputs at KL {pictures.TAIL_KL:g}: "
        + _list(tails) + "."
    )  # fmt: skip
    return lines


def _list(values: Mapping[tuple[str, int | None], float]) -> str:
    return ", ".join(
        f"{value:.3f} {'pi*' if K is None else f'{pictures.NAMES[method]}, K = {K}'}"
        for (method, K), value in values.items()
    )


def render(
    source: str, results: Results, leads: Sequence[Lead], effects: Sequence[AtKl], sentences: Sequence[str]
) -> str:
    """The report as HTML that needs no other file."""
    parts = [
        "<h1>When EXO beats DPO</h1>",
        f'<p class="note">Texts: {escape(source)}. The reward has two modes: how strongly a text is felt, kindly or '
        f"not. Intervals hold {COVERAGE} % of a bootstrap over test prompts.</p>",
        "<ul>", *(f"<li>{escape(sentence)}</li>" for sentence in sentences), "</ul>",
    ]  # fmt: skip
    for policy in results.references:
        parts += [
            f"<h2>Reward against KL, {escape(policy)} (the paper's Figure 2)</h2>",
            '<p class="note">A point is the end of a run; a line goes from pi_sft over the beta_r of one seed and '
            "learning rate. Lines are no training paths.</p>",
            _image(pictures.draw_frontiers(results.runs, results.references, policy), f"frontiers of {policy}"),
            _image(pictures.draw_leads(leads, policy), f"leads of EXO, {policy}"),
        ]
    parts += [
        f"<h2>What K does at KL {EFFECT_KL:g}</h2>",
        _effects_table(effects),
        "<h2>Theorem 3.1: the optimum of the generalised objective</h2>",
        _table(
            ["beta_pi", "beta_r", "largest |log pi - log pi*|"],
            [[f"{each.beta_pi:g}", f"{each.beta_r:g}", f"{each.error:.1e}"] for each in results.errors],
        ),
        "<h2>Theorems 3.2 and 3.3: gradients at K candidates</h2>",
        _image(pictures.draw_cosines(results.cosines), "cosines over K"),
        "<h2>Figure 1: two modes</h2>",
        _image(pictures.draw_modes(results.modes), "mass on two modes"),
        "<h2>Figure 3: unlikely outputs</h2>",
        _image(pictures.draw_tail(results.tail), "mass by likelihood"),
    ]
    head = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>exo-megatron: EXO against DPO</title>'
    return "\n".join([head, f"<style>{STYLE}</style></head><body>", *parts, "</body></html>\n"])


def _effects_table(effects: Sequence[AtKl]) -> str:
    lines = [
        [str(each.setting), str(each.seed), pictures.NAMES[each.method], _show(each.reward), _show(each.change)]
        for each in effects
    ]
    return _table(["setting", "seed", "method", "reward", "change from the K before"], lines)


def _show(value: Bounded | None) -> str:
    return "" if value is None else f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
