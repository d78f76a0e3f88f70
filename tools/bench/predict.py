"""The formula for your own lengths and model: what each idea is worth, without running anything.

    python -m tools.bench predict --lengths hh --k 8 --model 7b
    python -m tools.bench predict --lengths runs/scored --model path/to/HF-model

--lengths: hh or tldr (means of 47 + 230 and 400 + 50 tokens, drawn log-normal), or a JSONL file: one
group a line, as lengths in tokens, {"prompt": 47, "candidates": [230, 190]}; as candidates that
`rollout` and `score` leave, in their output or in one file; or as texts that `align` reads, for
which the tokenizer is that of --tokenizer or of the model's directory. --k: candidates a prompt;
of a file, whose groups have their own, candidates are then repeated or left out. --model: 7b, 8b,
or a directory with an HF config.json.

"plain" is a trainer with one sequence per candidate and no padding: the best that an HF model can
do. All lines count FLOPs of a step without Adam.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from exo_megatron.config.sections import DataConfig
from exo_megatron.data.dataset import load_groups
from exo_megatron.data.group_builder import Purpose
from exo_megatron.data.shards import find_shards
from exo_megatron.data.tokenizer import load_tokenizer
from exo_megatron.diagnosis.work import Lengths, ModelSize
from exo_megatron.errors import ConfigError, DataError
from exo_megatron.utils.files import read_lines
from tools.bench.lengths import HH, TLDR
from tools.bench.table import Table
from tools.bench.work import MODELS, chunks, model_size, padded_work, waterfall

DRAWN = 512
"""Groups that are drawn of a named kind of lengths."""
NAMED = {"hh": HH, "tldr": TLDR}
PADDED = 8
"""Sequences a batch of the line that shows what padding costs."""


def main(argv: Sequence[str]) -> int:
    """Print the table of the arguments' lengths and model, and return 0.

    Raises ConfigError or DataError for arguments and files that are of no use.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", required=True, metavar="PATH|hh|tldr")
    parser.add_argument("--k", type=int, metavar="K")
    parser.add_argument("--model", default="7b", metavar="7b|8b|DIRECTORY")
    parser.add_argument("--tokenizer", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args(argv)
    tokenizer = arguments.tokenizer or (Path(arguments.model) if arguments.model not in MODELS else None)
    groups = read_groups(arguments.lengths, arguments.k, tokenizer)
    print(predict(groups, model_size(arguments.model)).markdown(with_machine=False))
    return 0


def read_groups(lengths: str, candidates: int | None, tokenizer: Path | None = None) -> list[Lengths]:
    """Draw groups of named lengths, or read those of a file.

    tokenizer: a directory, for a file of texts. Raises ConfigError, DataError.
    """
    if candidates is not None and candidates < 1:
        raise ConfigError("--k", f"is {candidates}", expected="a positive whole number", fix="give one, such as 8")
    if lengths in NAMED:
        return NAMED[lengths].draw(DRAWN, 2 if candidates is None else candidates)
    path = Path(lengths)
    files = find_shards(path) or ([path] if path.is_file() else [])
    if not files:
        raise ConfigError(
            "--lengths",
            f"{lengths!r} is no file and holds no candidates",
            expected="hh, tldr, a JSONL file, or the output of rollout or score",
            fix="correct it",
        )
    lines = [(f"{file}:{number}", line) for file in files for number, line in read_lines(file)]
    if not lines:
        raise DataError(str(path), "has no groups", expected="a JSON object a line", fix="give another file")
    purpose = _purpose_of_texts(lines[0][1])
    groups = [_parse(*line) for line in lines] if purpose is None else _read_texts(path, purpose, tokenizer)
    if candidates is None:
        return groups
    return [replace(group, candidates=tuple(islice(cycle(group.candidates), candidates))) for group in groups]


def _purpose_of_texts(line: str) -> Purpose | None:
    """Tell what a record of texts is for; None for a record of numbers."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    if isinstance(fields, dict) and "completions" in fields:
        return "rewards"
    return "preference" if isinstance(fields, dict) and "chosen" in fields else None


def _read_texts(path: Path, purpose: Purpose, tokenizer: Path | None) -> list[Lengths]:
    if tokenizer is None:
        raise ConfigError(
            "--tokenizer",
            f"is not given, and {path} has texts",
            expected="the directory of a tokenizer",
            fix="give it, or the model's directory as --model",
        )
    data = DataConfig(path=str(path), max_prompt_tokens=sys.maxsize, max_completion_tokens=sys.maxsize)
    return [Lengths.of(group) for group in load_groups(data, load_tokenizer(tokenizer), purpose=purpose)]


def _parse(where: str, line: str) -> Lengths:
    """Read one group's lengths: numbers, or token ids as candidates files have them."""
    try:
        record: Any = json.loads(line)
        ids = record.get("prompt_ids")
        if ids is None:
            prompt, candidates = record["prompt"], record["candidates"]
        else:
            prompt, candidates = len(ids), [len(each["token_ids"]) for each in record["candidates"]]
        numbers = [prompt, *candidates]
        if len(numbers) < 2 or not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(f"lengths {numbers!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            where,
            f"no lengths of a group ({type(error).__name__}: {error})",
            expected='{"prompt": 47, "candidates": [230, 190]}, or a stored candidate record with token ids',
            fix="write the lengths in tokens, or name the output of `rollout` or `score`",
        ) from None
    return Lengths(prompt, tuple(candidates))


def predict(groups: Sequence[Lengths], model: ModelSize) -> Table:
    """Make the table of a model and of groups."""
    rungs = waterfall(groups)
    plain = rungs[0].flops(model)
    texts = [group.prompt + candidate for group in groups for candidate in group.candidates]
    padded = replace(rungs[0], name=f"padded, {PADDED} sequences a batch", work=padded_work(chunks(texts, PADDED)))
    lines, before = [], padded.flops(model)
    for rung in (padded, *rungs):
        flops = rung.flops(model)
        per_group = flops / len(groups) / 1e12
        cells = (f"{per_group:.3g}", f"{before / flops:.2f}", f"{plain / flops:.2f}")
        lines.append((rung.name, f"{rung.work.tokens:,}", f"{rung.work.projected:,}", *cells))
        before = flops
    means = sum(group.prompt for group in groups) / len(groups), sum(map(_mean, groups)) / len(groups)
    sizes = sorted({len(group.candidates) for group in groups})
    shown = f"K={sizes[0]}" if len(sizes) == 1 else f"K={sizes[0]} to {sizes[-1]}"
    return Table(
        f"{model.name}, {len(groups)} groups of {shown}, {means[0]:.0f} + {means[1]:.0f} tokens in the mean",
        ("step", "tokens", "projected", "TFLOP a group", "gain of this line", "plain / this"),
        lines,
        (
            f"Output layer: {model.head_share:.1%} of the linear FLOPs of a token.",
            "plain: one sequence per candidate without padding, every position projected, live reference. Packing "
            "fills micro-batches and changes no FLOPs.",
        ),
    )


def _mean(group: Lengths) -> float:
    return sum(group.candidates) / len(group.candidates)
