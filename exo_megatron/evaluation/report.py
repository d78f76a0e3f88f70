"""The report of an evaluation: one HTML file that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.evaluation.estimates import REFERENCE_NAME, Estimate

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .prompt { color: #777; } .note { color: #555; font-size: 0.9rem; }
"""

NUMBER_HEADERS = ("step", "reward", "± s.e.", "KL (nats)", "± s.e.", "tokens", "finished")


def render_report(
    estimates: Sequence[Estimate],
    samples: Mapping[str, Sequence[CandidateRecord]],
    *,
    picture: bytes,
    settings: Mapping[str, object],
    shown_prompts: int,
) -> str:
    """Render the report as HTML text. All texts are escaped.

    Args:
        estimates: estimates of all checkpoints.
        samples: the scored samples of each model's last checkpoint, by name, at the same prompts.
        picture: bytes of a PNG.
        settings: settings of the evaluation, shown as they are.
        shown_prompts: number of prompts, spread over the list, whose first sample is shown.
    """
    first = estimates[0]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"><title>exo-megatron: evaluation</title>',
            f"<style>{STYLE}</style></head><body>",
            "<h1>Reward against KL to the reference policy</h1>",
            f'<p class="note">{first.samples} samples at each of {first.prompts} prompts; standard errors over '
            "prompts. KL is that of whole completions, at the sampling temperature.</p>",
            f'<img alt="reward against KL" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
            "<h2>Checkpoints</h2>",
            _estimates_table(estimates),
            "<h2>Samples</h2>",
            '<p class="note">One sample of the last checkpoint of each model, drawn with the same random numbers.</p>',
            *_samples_tables(samples, shown_prompts),
            "<h2>Settings</h2>",
            _settings_table(settings),
            "</body></html>\n",
        ]
    )


def _estimates_table(estimates: Sequence[Estimate]) -> str:
    head = "<th>model</th>" + "".join(f'<th class="number">{escape(each)}</th>' for each in NUMBER_HEADERS)
    return f"<table><tr>{head}</tr>{''.join(map(_estimate_row, estimates))}</table>"


def _estimate_row(each: Estimate) -> str:
    numbers = (
        "" if each.step is None else str(each.step),
        f"{each.reward:.3f}",
        f"{each.reward_stderr:.3f}",
        f"{each.kl:.3f}",
        f"{each.kl_stderr:.3f}",
        f"{each.tokens:.1f}",
        f"{each.finished:.1%}",
    )
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    return f"<tr><td>{escape(each.name)}</td>{cells}</tr>"


def _samples_tables(samples: Mapping[str, Sequence[CandidateRecord]], shown: int) -> list[str]:
    names = sorted(samples, key=lambda name: name != REFERENCE_NAME)
    total = len(samples[names[0]])
    count = min(shown, total)
    return [_prompt_table({name: samples[name][total * i // count] for name in names}) for i in range(count)]


def _prompt_table(records: Mapping[str, CandidateRecord]) -> str:
    rows = [
        f'<tr><td>{escape(name)}</td><td><span class="prompt">{escape(record.prompt)}</span>'
        f'{escape(record.candidates[0].text)}</td><td class="number">{(record.rewards or (0.0,))[0]:.2f}</td></tr>'
        for name, record in records.items()
    ]
    return f'<table><tr><th>model</th><th>text</th><th class="number">reward</th></tr>{"".join(rows)}</table><br>'


def _settings_table(settings: Mapping[str, object]) -> str:
    rows = (f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in settings.items())
    return f"<table>{''.join(rows)}</table>"
