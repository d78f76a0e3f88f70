"""Labelled texts cut into prompts and completions, and parted into those to learn from and those to be tested on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.errors import DataError
from exo_megatron.utils.files import read_jsonl
from quickstart.corpus import LabelledText

PROMPT_WORDS = 5
"""A prompt is the first words of a text, its completion the rest."""

TEST_PROMPTS = 320
"""Prompts that no stage but `evaluate` sees."""

MINIMUM_TEXTS = 1500


@dataclass(frozen=True)
class Split:
    """train: texts whose prompts are not in test_prompts. train_prompts, test_prompts: distinct, in random order."""

    train: list[LabelledText]
    train_prompts: list[str]
    test_prompts: list[str]


def read_reviews(path: Path) -> list[LabelledText]:
    """Read JSONL records {"text", "label"} with labels 0 and 1. Raises DataError naming the line."""
    reviews = []
    for number, record in read_jsonl(path):
        text, label = record.get("text"), record.get("label")
        if not isinstance(text, str) or isinstance(label, bool) or label not in (0, 1):
            raise DataError(
                f"{path}:{number}",
                f"has text {text!r:.40} and label {label!r}",
                expected='{"text": a string, "label": 0 (negative) or 1 (positive)}',
                fix="correct or remove the line",
            )
        reviews.append(LabelledText(" ".join(text.split()), int(label)))
    if len({review.label for review in reviews}) < 2:
        raise DataError(str(path), "has one label only", expected="both labels, 0 and 1", fix="add texts of the other")
    return reviews


def cut(text: str) -> tuple[str, str]:
    """Prompt and completion; the completion begins with the space that parts them, and may be empty."""
    words = text.split(" ")
    return " ".join(words[:PROMPT_WORDS]), "".join(f" {word}" for word in words[PROMPT_WORDS:])


def split_reviews(reviews: Sequence[LabelledText], *, where: str, seed: int) -> Split:
    """Hold out TEST_PROMPTS prompts with all texts that begin with them; texts that are prompt only are left out."""
    whole = [review for review in reviews if cut(review.text)[1]]
    prompts = list(dict.fromkeys(cut(review.text)[0] for review in whole))
    if len(whole) < MINIMUM_TEXTS or len(prompts) < 2 * TEST_PROMPTS:
        raise DataError(
            where,
            f"has {len(whole)} texts of more than {PROMPT_WORDS} words, which begin in {len(prompts)} ways",
            expected=f"at least {MINIMUM_TEXTS} texts that begin in {2 * TEST_PROMPTS} ways",
            fix="give more texts",
        )
    random.Random(seed).shuffle(prompts)
    test = set(prompts[:TEST_PROMPTS])
    train = [review for review in whole if cut(review.text)[0] not in test]
    return Split(train, prompts[TEST_PROMPTS:], prompts[:TEST_PROMPTS])
