"""Texts as word ids, and a reward with two modes: how strongly a text is felt, whether kindly or not.

The paper asks what a loss does where the policy cannot follow all that is rewarded. A reward that kind texts and
unkind ones get alike has two modes; a policy that cannot tell the states apart has to choose one or to lie between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from quickstart.corpus import make_corpus
from quickstart.oracle import Oracle, fit_oracle
from quickstart.reviews import read_reviews
from torch import Tensor

from exo_megatron.errors import DataError
from exo_megatron.utils.files import read_json, write_json

END, UNKNOWN, BEGIN = 0, 1, 2
"""Ids of what is no word."""

SPECIAL = ("</s>", "<unk>", "<s>")
GRAMMAR_SIZE = 6000
VOCABULARY = 800
MINIMUM_TEXTS, MINIMUM_OPENINGS = 1500, 50
REWARD_SCALE = 2.0


@dataclass(frozen=True)
class Reviews:
    """Texts in the most frequent words, and the sentiment oracle that was fitted on their labels.

    Attributes:
        words: SPECIAL, then words by frequency.
        texts: word ids, without END and BEGIN.
        source: where the texts are from, in words.
    """

    words: tuple[str, ...]
    texts: tuple[tuple[int, ...], ...]
    oracle: Oracle
    source: str

    def reward(self, ids: Iterable[int]) -> float:
        """REWARD_SCALE * |log-odds that the text is positive|; SPECIAL ids are left out."""
        text = " ".join(self.words[i] for i in ids if i >= len(SPECIAL))
        return REWARD_SCALE * abs(self.oracle.log_odds(text))

    def rewards(self, ids: Tensor) -> Tensor:
        """`reward` of each line of word ids [N, L], as [N] fp64."""
        return torch.tensor([self.reward(text) for text in ids.tolist()], dtype=torch.float64)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        oracle = {"weights": self.oracle.weights, "bias": self.oracle.bias}
        write_json(path, {"source": self.source, "words": self.words, "texts": self.texts, "oracle": oracle})

    @classmethod
    def load(cls, path: Path) -> Reviews:
        """Read what `save` wrote."""
        stored = read_json(path)
        texts = tuple(tuple(text) for text in stored["texts"])
        return cls(tuple(stored["words"]), texts, Oracle(**stored["oracle"]), stored["source"])


def load_reviews(data: Path | None, *, seed: int = 0) -> Reviews:
    """Read labelled texts, or make them with the quickstart's grammar. Raises DataError for bad lines or too few."""
    labelled = make_corpus(GRAMMAR_SIZE, seed=seed) if data is None else read_reviews(data)
    split = [review.text.split() for review in labelled]
    long = [text for text in split if len(text) > 5]
    ways = len({tuple(text[:2]) for text in long})
    if len(long) < MINIMUM_TEXTS or ways < MINIMUM_OPENINGS:
        raise DataError(
            str(data),
            f"has {len(long)} texts of more than 5 words, whose first two words begin in {ways} ways",
            expected=f"at least {MINIMUM_TEXTS} texts that begin in {MINIMUM_OPENINGS} ways",
            fix="give more texts",
        )
    words = (*SPECIAL, *most_frequent(split, VOCABULARY))
    index = {word: i for i, word in enumerate(words)}
    return Reviews(
        words=words,
        texts=tuple(tuple(index.get(word, UNKNOWN) for word in text) for text in split),
        oracle=fit_oracle([review.text for review in labelled], [review.label for review in labelled]),
        source="the quickstart's grammar" if data is None else str(data),
    )


def most_frequent(texts: Iterable[Sequence[str]], size: int) -> list[str]:
    """At most `size` words, the most frequent first."""
    counts = Counter(word for text in texts for word in text)
    return [word for word, _ in counts.most_common(size)]
