"""What the quickstart starts from: corpus, split, tokenizer, model, oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from quickstart.corpus import GRAMMAR, LabelledText, make_corpus
from quickstart.oracle import Oracle, features, fit_oracle, load_oracle, score
from quickstart.prepare import LONGEST_COMPLETION, main, prepare
from quickstart.reviews import PROMPT_WORDS, TEST_PROMPTS, cut, read_reviews, split_reviews
from transformers import AutoModelForCausalLM

from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import DataError
from exo_megatron.utils.files import read_json, read_jsonl


@pytest.fixture(scope="module")
def corpus() -> list[LabelledText]:
    return make_corpus(2500, seed=3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs made from a file of the user's."""
    root = tmp_path_factory.mktemp("quickstart")
    lines = (json.dumps({"text": f"  {r.text}\n", "label": r.label}) for r in make_corpus(2500, seed=3))
    (root / "reviews.jsonl").write_text("\n".join(lines))
    prepare(root / "output", root / "reviews.jsonl", 3)
    return root / "output" / "inputs"


def test_corpus_is_varied_balanced_and_reproducible(corpus: list[LabelledText]) -> None:
    assert corpus == make_corpus(2500, seed=3)
    assert corpus != make_corpus(2500, seed=4)
    assert len({review.text for review in corpus}) == len(corpus)
    assert sum(review.label for review in corpus) == len(corpus) / 2
    assert all("{" not in review.text and "  " not in review.text for review in corpus)
    words = {word for review in corpus for word in review.text.split()}
    known = {word for choices in GRAMMAR.values() for choice in choices for word in choice.split() if "{" not in word}
    assert words == known


def test_completions_begin_with_the_space_that_parts_them() -> None:
    assert cut("a b c d e f g") == ("a b c d e", " f g")
    assert cut("a b") == ("a b", "")


def test_test_prompts_begin_no_training_text(corpus: list[LabelledText]) -> None:
    split = split_reviews(corpus, where="here", seed=0)
    assert len(set(split.test_prompts)) == TEST_PROMPTS
    assert not set(split.test_prompts) & {cut(review.text)[0] for review in split.train}
    assert set(split.train_prompts) == {cut(review.text)[0] for review in split.train}
    assert {review.label for review in split.train} == {0, 1}
    assert all(len(prompt.split()) == PROMPT_WORDS for prompt in split.test_prompts)


def test_too_few_texts(corpus: list[LabelledText]) -> None:
    with pytest.raises(DataError, match=r"mine\.jsonl: has 400 texts"):
        split_reviews(corpus[:400], where="mine.jsonl", seed=0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a b", "label": 2}', "label 2"),
        ('{"text": "a b", "label": true}', "label True"),
        ('{"text": "a b"}', "label None"),
        ('{"text": 1, "label": 1}', "text 1"),
        ('{"text": "a b", "label": 1', "is not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "reviews.jsonl"
    file.write_text('{"text": "x y", "label": 0}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_reviews(file)
    assert caught.value.where == f"{file}:2"
    assert problem in caught.value.problem


def test_one_label_only(tmp_path: Path) -> None:
    (tmp_path / "reviews.jsonl").write_text('{"text": "x y", "label": 1}\n' * 3)
    with pytest.raises(DataError, match="has one label only"):
        read_reviews(tmp_path / "reviews.jsonl")


def test_oracle_knows_the_labels_and_words_it_has_not_seen_count_nothing(corpus: list[LabelledText]) -> None:
    train, test = corpus[:2000], corpus[2000:]
    oracle = fit_oracle([r.text for r in train], [r.label for r in train])
    assert oracle.accuracy([r.text for r in test], [r.label for r in test]) > 0.85
    assert oracle.log_odds("xyzzy") == oracle.bias
    assert oracle.log_odds("the acting is brilliant .") > 0 > oracle.log_odds("the acting is tedious .")


def test_log_odds_of_a_balanced_feature_are_those_of_its_texts() -> None:
    """Without a penalty worth mentioning, one feature in 3 of 4 positive and 1 of 4 negative texts: odds 3 to 1."""
    texts = ["x"] * 3 + ["y"] + ["x"] + ["y"] * 3
    oracle = fit_oracle(texts, [1] * 4 + [0] * 4)
    assert features("x y x") == {"x", "y", "x y", "y x"}
    assert oracle.log_odds("x") == pytest.approx(math.log(3), abs=0.02)
    assert oracle.log_odds("y") == pytest.approx(-math.log(3), abs=0.02)


def test_reward_is_the_log_odds_of_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle({"good": 2.0, "not": -0.5, "not good": -3.25}, 0.125)
    oracle.save(tmp_path / "oracle.json")
    assert load_oracle(tmp_path / "oracle.json") == oracle
    monkeypatch.setenv("QUICKSTART_ORACLE", str(tmp_path / "oracle.json"))
    assert score(["it is not", "it is"], [" good", " good good"]) == [-1.625, 2.125]


@pytest.mark.usefixtures("inputs")
def test_texts_become_demonstrations(inputs: Path) -> None:
    records = [record for _, record in read_jsonl(inputs / "sft.jsonl")]
    texts = {review.text for review in make_corpus(2500, seed=3)}
    assert len(records) > 1500
    assert {record["prompt"] + record["chosen"] for record in records} <= texts
    assert len({record["id"] for record in records}) == len(records)
    assert all("label" not in record for record in records)
    train = {record["prompt"] for _, record in read_jsonl(inputs / "train_prompts.jsonl")}
    test = {record["prompt"] for _, record in read_jsonl(inputs / "test_prompts.jsonl")}
    assert len(test) == TEST_PROMPTS
    assert train == {record["prompt"] for record in records}
    assert not train & test


def test_tokenizer_keeps_every_text(inputs: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(inputs / "hf")
    longest = 0
    for _, record in read_jsonl(inputs / "sft.jsonl"):
        prompt, completion = (
            tokenizer.encode_prompt(record["prompt"]),
            tokenizer.encode_completion(record["chosen"], prompt=record["prompt"]),
        )
        assert prompt[0] == 1 and completion[-1] == tokenizer.eos_id == 2
        assert tokenizer.decode_completion(completion) == record["chosen"]
        assert tokenizer.decode(prompt + completion) == record["prompt"] + record["chosen"]
        longest = max(longest, len(completion))
    assert longest <= LONGEST_COMPLETION + 1
    # Words of the corpus are not spelt in bytes or letters.
    assert len(tokenizer.encode_completion(" a generous piece of work .", prompt="x")) < 16


def test_model_loads_and_fits_its_tokenizer(inputs: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(inputs / "hf"))
    assert model.config.vocab_size == load_tokenizer(inputs / "hf").vocab_size
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    assert not (inputs / "hf" / "pytorch_model.bin").exists()


def test_inputs_are_made_once_for_one_source(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, data = inputs.parent, inputs.parents[1] / "reviews.jsonl"
    before = (inputs / "hf" / "model.safetensors").stat().st_mtime_ns
    prepare(output, data, 3)
    assert (inputs / "hf" / "model.safetensors").stat().st_mtime_ns == before
    assert set(read_json(inputs / "source.json")) == {"seed", "texts"}
    monkeypatch.setattr("sys.argv", ["prepare", "--output", str(output), "--data", str(data), "--seed", "4"])
    assert main() == 2
    assert "made from other texts or with another seed" in capsys.readouterr().err
