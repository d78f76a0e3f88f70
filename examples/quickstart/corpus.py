"""Short film reviews with a sentiment label, from a small grammar.

A stand-in for labelled sentences where there are none: every text has a topic, a style and a feeling, and a model
has to learn which words belong together before it can be asked for kinder reviews.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SLIP = 0.1
"""Share of opinions that contradict the review's label, so that no single word decides."""

# {name} is a neutral symbol. {+name} is an opinion: name_good or name_bad, by the label (and, seldom, against it).
GRAMMAR: dict[str, list[str]] = {
    "review": [
        "{part} in {film} {is} {+how} , {and} {claim} .",
        "{part} of {film} {is} {+how} .",
        "{film} {is} {+what} from {maker} .",
        "{film} by {maker} {+does} , {and} {claim} .",
        "{person} watched {film} {when} {and} {claim} .",
        "{person} went to see {film} {when} ; {claim} .",
        "{when} {person} saw {film} , {and} {claim} .",
        "as {kind} , {film} {+does} .",
        "{when} i chose {film} by {maker} ; {claim} .",
        "{maker} {+makes} {film} , {and} {claim} .",
        "{maker} gives us {+what} , {and} {claim} .",
        "{claim} , {but} {part} {is} {+how} {and} {claim} .",
        "if you like {kind} , {film} {+does} .",
        "for {audience} , {film} {is} {+what} .",
        "there {is} {+what} in {film} , {and} {part} {is} {+how} .",
    ],
    "claim": [
        "{part} {is} {+how}",
        "{part} {+does}",
        "{part} {is} {+how} and {+how}",
        "the whole thing {+does}",
        "{person} {+felt} {part}",
        "{person} {+felt} every minute",
        "the result {is} {+what}",
        "it {is} {+what}",
    ],
    "film": ["{the} {tone} {genre}", "{the} {genre}", "{the} {genre} about {theme}", "{the} {genre} set {place}"],
    "the": ["the", "this", "this new", "the new", "that", "this latest", "the second"],
    "kind": ["a {genre}", "a {tone} {genre}", "a {genre} about {theme}"],
    "tone": ["quiet", "noisy", "low budget", "historical", "modern", "cartoon", "french", "silent", "city", "western"],
    "genre": ["thriller", "comedy", "drama", "romance", "documentary", "mystery", "sequel", "musical", "war film"],
    "theme": ["two brothers", "a letter", "the sea", "a small school", "the old farmer", "war", "a bank robbery"],
    "place": ["in berlin", "in a small town", "on a train", "in the desert", "at sea", "in the future", "in space"],
    "part": ["the {craft}", "the {craft}", "its {craft}", "{star}", "the {craft} of {star}"],
    "craft": ["acting", "plot", "dialogue", "music", "camera work", "ending", "cast", "script", "story", "pacing"],
    "star": ["the lead actor", "the young heroine", "the villain", "the supporting cast", "the child actor"],
    "maker": ["the director", "a first time director", "the studio", "a famous writer", "the writer of {kind}"],
    "person": ["i", "we", "my sister", "my friends", "the audience", "a colleague"],
    "audience": ["children", "fans of the book", "a rainy evening", "the whole family", "night owls", "critics"],
    "when": ["last night", "on sunday", "at a festival", "on a long flight", "yesterday", "in a full cinema"],
    "and": ["and", "and", "so", "and again"],
    "but": ["but", "still", "yet"],
    "is": ["is", "was", "seems"],
    "how_good": [
        "superb", "brilliant", "moving", "truly charming", "clever", "a delight", "wonderful", "fresh and warm",
        "full of wit", "never dull", "beautifully done", "honest", "gripping", "as good as it gets",
    ],
    "how_bad": [
        "awful", "tedious", "lifeless", "truly painful", "lazy", "a chore", "terrible", "stale and cold",
        "full of holes", "never funny", "badly done", "fake", "boring", "as bad as it gets",
    ],
    "what_good": [
        "a small masterpiece", "a joy from start to end", "one of the best of the year", "a rare gem",
        "a generous piece of work", "a triumph",
    ],
    "what_bad": [
        "a complete mess", "a waste of time", "one of the worst of the year", "a cheap copy",
        "a hollow piece of work", "a failure",
    ],
    "does_good": ["works", "shines", "wins you over", "stays with you", "rewards your patience", "soars"],
    "does_bad": ["falls flat", "drags", "wears you out", "goes nowhere", "tests your patience", "sinks"],
    "felt_good": ["loved", "enjoyed", "admired", "laughed with"],
    "felt_bad": ["hated", "regretted", "endured", "yawned at"],
    "makes_good": ["breathes life into", "rescues", "lifts up"],
    "makes_bad": ["ruins", "wastes", "throws away"],
}  # fmt: skip

_SYMBOL = re.compile(r"\{(\+?)(\w+)\}")


@dataclass(frozen=True)
class LabelledText:
    """One review: words separated by single spaces; label 1 is positive, 0 negative."""

    text: str
    label: int


def make_corpus(size: int, *, seed: int) -> list[LabelledText]:
    """`size` different reviews, labels alternating. The same seed gives the same reviews."""
    generator = random.Random(seed)
    texts: dict[str, int] = {}
    while len(texts) < size:
        label = len(texts) % 2
        texts.setdefault(_expand("review", label, generator), label)
    return [LabelledText(text, label) for text, label in texts.items()]


def _expand(symbol: str, label: int, generator: random.Random) -> str:
    def replace(match: re.Match[str]) -> str:
        if not match[1]:
            return _expand(match[2], label, generator)
        positive = bool(label) != (generator.random() < SLIP)
        return _expand(f"{match[2]}_{'good' if positive else 'bad'}", label, generator)

    return _SYMBOL.sub(replace, generator.choice(GRAMMAR[symbol]))
