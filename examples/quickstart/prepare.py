"""Makes everything that the pipeline starts from: texts, tokenizer, random model, oracle.

    python -m quickstart.prepare --output DIR [--data FILE] [--seed N]

Leaves in DIR/inputs: sft.jsonl, train_prompts.jsonl, test_prompts.jsonl, oracle.json and hf/ (the random model).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from exo_megatron.errors import DataError, ExoError
from exo_megatron.utils.files import read_json, write_json, write_jsonl
from quickstart.corpus import LabelledText, make_corpus
from quickstart.oracle import fit_oracle
from quickstart.reviews import Split, cut, read_reviews, split_reviews

CORPUS_SIZE = 6000

LONGEST_COMPLETION = 96
"""Tokens; longer texts are left out, and the pipeline's data.max_completion_tokens is one more for the end."""


def main() -> int:
    """Prepare the inputs; exit code 2 if the user's data cannot be used."""
    parser = argparse.ArgumentParser(description="inputs of the quickstart")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help='JSONL of {"text", "label"}; default: a corpus of its own')
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        prepare(arguments.output, arguments.data, arguments.seed)
    except ExoError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def prepare(output: Path, data: Path | None, seed: int) -> None:
    """Write the inputs, unless they are there already."""
    where = "the quickstart's own corpus" if data is None else str(data)
    reviews = make_corpus(CORPUS_SIZE, seed=seed) if data is None else read_reviews(data)
    inputs = output / "inputs"
    source = {"seed": seed, "texts": digest(reviews)}
    if is_prepared(inputs, source):
        print(f"inputs in {inputs} are there already")
        return
    split = split_reviews(reviews, where=where, seed=seed)
    write_inputs(inputs, split, where=where, seed=seed)
    write_json(inputs / "source.json", source)


def is_prepared(inputs: Path, source: dict[str, object]) -> bool:
    """Whether the inputs were made from this very source. Raises DataError if they are of another one."""
    marker = inputs / "source.json"
    if not marker.is_file():
        return False
    if read_json(marker) != source:
        raise DataError(
            str(inputs),
            "was made from other texts or with another seed",
            expected="an output directory of its own for each",
            fix="choose another --output, or remove this one",
        )
    return True


def digest(reviews: Sequence[LabelledText]) -> str:
    """Identifies texts and labels in their order."""
    lines = (json.dumps([review.text, review.label]) for review in reviews)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_inputs(inputs: Path, split: Split, *, where: str, seed: int) -> None:
    """Tokenizer and oracle learn from the training texts only."""
    from transformers import AutoTokenizer

    from quickstart.tiny_model import train_tokenizer, write_model

    model = inputs / "hf"
    model.mkdir(parents=True, exist_ok=True)
    train_tokenizer([review.text for review in split.train], model)
    parameters = write_model(model, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    lengths = [len(ids) for ids in tokenizer([cut(review.text)[1] for review in split.train])["input_ids"]]
    short = [review for review, length in zip(split.train, lengths, strict=True) if length <= LONGEST_COMPLETION]
    write_jsonl(inputs / "sft.jsonl", (sft_record(index, review) for index, review in enumerate(short)))
    write_jsonl(inputs / "train_prompts.jsonl", prompt_records("train", split.train_prompts))
    write_jsonl(inputs / "test_prompts.jsonl", prompt_records("test", split.test_prompts))
    texts, labels = [review.text for review in split.train], [review.label for review in split.train]
    oracle = fit_oracle(texts, labels)
    oracle.save(inputs / "oracle.json")
    print(
        f"{len(short)} training texts from {where} ({len(split.train) - len(short)} too long), "
        f"{len(split.test_prompts)} prompts held out\n"
        f"random Llama with {parameters:,} parameters and {len(tokenizer)} tokens; "
        f"oracle right on {oracle.accuracy(texts, labels):.1%} of the training texts"
    )


def sft_record(index: int, review: LabelledText) -> dict[str, str]:
    """A text as a demonstration. Its label is not used: the model learns both kinds of reviews."""
    prompt, completion = cut(review.text)
    return {"id": f"text-{index}", "prompt": prompt, "chosen": completion}


def prompt_records(name: str, prompts: Sequence[str]) -> list[dict[str, str]]:
    """Prompts with ids."""
    return [{"id": f"{name}-{index}", "prompt": prompt} for index, prompt in enumerate(prompts)]


if __name__ == "__main__":
    sys.exit(main())
