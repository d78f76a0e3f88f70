"""Texts in batches: the ids of `encode`, by words that are cut where no splitting rule can tell."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from exo_megatron.data import word_memo
from exo_megatron.data.hf_codec import HfCodec, load_hf_codec
from exo_megatron.data.sentencepiece_codec import SentencePieceCodec
from exo_megatron.data.word_memo import SPLITS, WordMemo, word_pattern
from tests.unit.data.tokenizers_made_here import hf_directory

ByteLevel, Sequence = pre_tokenizers.ByteLevel, pre_tokenizers.Sequence
SPECIAL = ["<|end|>", "<s>", "\n\n", "   ", "[/INST]"]
RULES = {
    "GPT-2": ByteLevel(add_prefix_space=False),
    "GPT-2, single digits": Sequence([pre_tokenizers.Digits(True), ByteLevel(add_prefix_space=False)]),
    "GPT-2, digits": Sequence([pre_tokenizers.Digits(False), ByteLevel(add_prefix_space=False)]),
} | {
    name: Sequence([pre_tokenizers.Split(Regex(split), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    for name, split in SPLITS.items()
}
NASTY = [
    *"aZß9²½Ⅷé漢ǅʰـ_.,/-'\"(<$€“”🙂\u0301\u200b\u200d\ufeff",
    *" \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2009\u2028\u2029\u3000",
    *(" ", "\n") * 12,
    *("  ", "    ", "\n\n", "\r\n", " \n", "\n ", "\t\n", ".\n\n", "/\n/", "'s", "'S", "'ſ", "'ll "),
    *("\n\nHuman: ", "\n\nAssistant:", " the", " a", " 2024", "12345 ", "I'm", " (", "word", "Wörter ", "слово "),
    *("don't", "e\u0301", "=\u0338", *SPECIAL),
]  # fmt: skip


def random_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    texts = ["".join(draw.choices(NASTY, k=draw.randrange(1, 30))) for _ in range(count)]
    planes = [range(0x20, 0xD800), range(0xE000, 0x30000)]

    def wild() -> str:
        return "".join(chr(draw.choice(draw.choice(planes))) + draw.choice(["", " ", "\n"]) for _ in range(9))

    return ["", " ", "\n", *texts, *(wild() for _ in range(count))]


def trained(rule: str) -> Tokenizer:
    """A BPE tokenizer that has merged what it could of nasty texts, so that a wrong cut changes ids."""
    return Tokenizer.from_str(_trained(rule))


@cache
def _trained(rule: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = RULES[rule]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(random_texts(150, seed=1), trainer)
    return str(tokenizer.to_str())


def codec_of(tokenizer: Tokenizer) -> HfCodec:
    return HfCodec(Path("made here"), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>"))


def words_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    return word_pattern(json.loads(tokenizer.to_str()))


@pytest.fixture(scope="module", params=RULES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param)


def test_cuts_are_where_the_rule_splits(tokenizer: Tokenizer) -> None:
    words, split = words_of(tokenizer), tokenizer.pre_tokenizer.pre_tokenize_str
    assert words is not None
    several = 0
    for text in random_texts(150, seed=2):
        cut = words.findall(text)
        assert "".join(cut) == text
        assert [piece for word in cut for piece, _ in split(word)] == [piece for piece, _ in split(text)]
        several += len(cut) > 3
    assert several > 100  # one word would pass, too


def test_batches_have_the_ids_of_single_texts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codec_of(tokenizer)
    texts = random_texts(150, seed=3)
    expected = [codec.encode(text, continuation=True) for text in texts]
    assert codec.encode_batch(texts, continuation=True) == expected
    monkeypatch.setattr(word_memo, "MOST_WORDS", 5)
    assert codec_of(tokenizer).encode_batch(texts, continuation=False) == expected


def test_expressions_are_those_of_the_families() -> None:
    families = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    assert set(SPLITS.values()) <= set(families.GGUF_PRE_TOKENIZER_SPLITS.values())


def test_composed_characters_are_no_hindrance() -> None:
    tokenizer = trained("Qwen 2")
    tokenizer.normalizer = normalizers.NFC()
    assert words_of(tokenizer) is not None
    codec = codec_of(tokenizer)
    texts = [*random_texts(300, seed=4), "e\u0301 a\n=\u0338 b\u0323\u0307 \u0301", "\u1100 \u1161"]
    assert codec.encode_batch(texts, continuation=True) == [codec.encode(text, continuation=True) for text in texts]


def test_no_character_before_a_cut_is_a_blank_to_the_library() -> None:
    """All of Unicode, because Python and the library have tables of their own."""
    blanks = pre_tokenizers.Split(Regex(r"\s"), "removed")
    words = words_of(trained("Llama 3"))
    assert words is not None
    before = "".join(c for c in map(chr, range(0x40000)) if len(words.findall(f"{c} ")) == 2)
    assert len(before) > 100_000
    assert [piece for piece, _ in blanks.pre_tokenize_str(before)] == [before]
    assert [piece for piece, _ in blanks.pre_tokenize_str("x \u2003x")] == ["x", "x"]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True, "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
    ],
    ids=str,
)
def test_other_tokenizers_get_whole_texts(change: dict[str, Any]) -> None:
    description = json.loads(trained("GPT-2").to_str())
    assert word_pattern(description) is not None
    assert word_pattern(description | change) is None


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<a b>"),
        AddedToken("a\nb"),
        AddedToken("\nb", normalized=False),
        AddedToken("<x>", lstrip=True),
        AddedToken("<x>", rstrip=True),
        AddedToken("<x>", single_word=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", ["GPT-2", "Llama 3"])
def test_added_tokens_that_a_cut_could_change_switch_it_off(rule: str, token: AddedToken) -> None:
    tokenizer = trained(rule)
    tokenizer.add_tokens([token])
    assert words_of(tokenizer) is None
    codec = codec_of(tokenizer)
    text = "x <a b> a\nb <x> <x>  y <x>\n"
    assert codec.encode_batch([text], continuation=True) == [codec.encode(text, continuation=True)]


@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
@pytest.mark.parametrize("continuation", [False, True])
def test_spaces_put_before_texts(tmp_path: Path, kind: str, continuation: bool) -> None:
    codec = load_hf_codec(hf_directory(tmp_path, kind))
    texts = ["The movie was good", " was  good", "", "</s> x"]
    expected = [codec.encode(text, continuation=continuation) for text in texts]
    assert codec.encode_batch(texts, continuation=continuation) == expected


def test_a_prefix_space_is_put_before_the_text_alone() -> None:
    tokenizer = trained("GPT-2")
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    codec = codec_of(tokenizer)
    for continuation in (False, True):
        texts = ["the word\nword", " the word"]
        expected = [codec.encode(text, continuation=continuation) for text in texts]
        assert codec.encode_batch(texts, continuation=continuation) == expected
        assert (expected[0] == codec.encode(" the word\nword", continuation=True)) is not continuation


def test_sentencepiece_in_batches(spm_file: Path) -> None:
    codec = SentencePieceCodec(spm_file)
    texts = ["The movie was good", " was  good", ""]
    for continuation in (False, True):
        expected = [codec.encode(text, continuation=continuation) for text in texts]
        assert codec.encode_batch(texts, continuation=continuation) == expected


def test_the_memo_asks_once_for_a_word_and_forgets_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def encode(words: list[str]) -> list[list[int]]:
        asked.append(sorted(words))
        return [[len(word), 2**31 - 1] for word in words]

    monkeypatch.setattr(word_memo, "MOST_WORDS", 2)
    memo = WordMemo(re.compile("[^,]+"), encode)
    long = "x" * (word_memo.LONGEST_WORD + 1)
    ids = [1, 2**31 - 1, 2, 2**31 - 1, 1, 2**31 - 1, len(long), 2**31 - 1]
    assert memo.encode([f"a,bb,a,{long}", "a"]) == [ids, ids[:2]]
    memo.encode([f"{long},bb"])
    memo.encode(["ccc,bb", "ccc"])  # more than two words: all are forgotten
    memo.encode(["bb"])
    assert asked == [["a", "bb", long], [long], ["ccc"], ["bb"]]
