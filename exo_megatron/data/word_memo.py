r"""Texts become ids by way of their words, most of which were met before.

A text is cut into words where that changes no id, for splitting rules of which it is known. A tokenizer
splits a text by a regular expression and turns each piece into ids by itself. None of the expressions
below looks behind a place, and every character is in a match. So a cut between x and y changes nothing
if no match holds both, and if no match before it depends on what comes after x. The cuts are

- y is a space, x is visible ASCII, a letter or a digit: a space is only the first character of a
  match or among blanks, which x is not. A match before y ends at x or earlier, there as at the end of
  the text; `\s+(?!\S)` ends before x, and so does what it looks at.
- y is a line break, and x is an ASCII letter or digit: as above. Punctuation takes the line breaks
  behind it, except in GPT-2's rule, where x may be what it may be before a space.
- x is a line break, and y is visible ASCII but no slash, except in GPT-2's rule: `\s*[\r\n]+` takes all
  blanks up to x and is tried before `\s+(?!\S)`, `[\r\n/]*` takes all breaks, and no match goes on from
  a break to y.

Digits split before GPT-2's rule, as some tokenizers do it, begin and end between x and y or elsewhere.
NFC changes neither blanks nor visible ASCII at the end of a text, makes no blanks, and joins no
character to the one before a space, a line break or an ASCII character. Added tokens are looked for in
the text first; the cuts keep them if none of them can hold one, and none looks at its neighbours.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

_GPT2_WORD = re.compile(r"(?s:.)[^ \n]*+(?:(?<![!-~\w])[ \n][^ \n]*+)*+")
_WORD = re.compile(r"(?s:.)(?:(?<!\n)[^ \n]++|(?<![!-~\w]) |(?<![A-Za-z0-9])\n|(?<=\n)(?![!-.0-~])[^ \n]++)*+")
_CUT = re.compile(r"\S[ \n]|\n\S")
"""What a text has wherever it can be cut."""

SPLITS = {
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Qwen 2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Qwen 3.5": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "GPT-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Mistral Nemo": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Expressions by a family that has them, as they stand in tokenizer.json."""

MOST_WORDS = 2**17
"""About 20 MB."""
LONGEST_WORD = 32
"""Characters of a word that is kept."""


def word_pattern(description: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return an expression that matches one word after the other of a text, all of it.

    The ids of a text are those of its words, one after another. None if that is not known of the
    tokenizer.

    Args:
        description: tokenizer.json as the tokenizers library writes it.
    """
    model, normalizer = description["model"], description["normalizer"]
    if model["type"] != "BPE" or model["dropout"] or (normalizer is not None and normalizer["type"] != "NFC"):
        return None
    if not all(map(_is_kept_by_cuts, description["added_tokens"])):
        return None
    match _steps(description["pre_tokenizer"]):
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return _GPT2_WORD
        case [{"type": "Digits"}, {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return _GPT2_WORD
        case [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if split in SPLITS.values():
            return _WORD
    return None


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    match pre_tokenizer:
        case None:
            return []
        case {"type": "Sequence", "pretokenizers": list(steps)}:
            return steps
    return [pre_tokenizer]


def _is_kept_by_cuts(token: Mapping[str, Any]) -> bool:
    looks_around = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not looks_around and _CUT.search(token["content"]) is None


class WordMemo:
    """The ids of words, kept for the next text that has them.

    Args:
        word: an expression that matches one word after the other of any text, all of it.
        encode: gives the ids of each of several words. Those of a text are those of its words, one
            after another.
    """

    def __init__(self, word: re.Pattern[str], encode: Callable[[list[str]], list[list[int]]]) -> None:
        self._split = word.findall
        self._encode = encode
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. Words that are new are encoded together."""
        split = [self._split(text) for text in texts]
        new = list(set(chain.from_iterable(split)).difference(self._known))
        known = self._known
        known.update((word, array("i", ids).tobytes()) for word, ids in zip(new, self._encode(new), strict=True))
        ids = [memoryview(b"".join(map(known.__getitem__, words))).cast("i").tolist() for words in split]
        for word in new:
            if len(word) > LONGEST_WORD:
                del known[word]
        if len(known) > MOST_WORDS:
            known.clear()  # frequent words are soon here again
        return ids
