"""The part of a verification that runs both models: prompts, memory, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exo_megatron.checkpoint.directory import tokenizer_path
from exo_megatron.config.stages import VerifyConfig
from exo_megatron.conversion.verifying import Comparison, Direction
from exo_megatron.data.records import SourceRecord
from exo_megatron.data.sources import read_jsonl_records
from exo_megatron.data.text import completion_texts, prompt_text
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import DataError
from exo_megatron.evaluation.logits import (
    Agreement,
    Example,
    PackedExamples,
    Rounding,
    built_in_examples,
    compare_outputs,
    longest_example,
    memory_shortage,
    windows_not_exceeded,
)
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.stages.verification import Check
from exo_megatron.utils.files import read_bounded

REMOTE_CODE = frozenset({"chatglm"})
"""Families whose HF code comes with the weights and not with transformers.

It is never run, so HF has no logits.
"""


def check_logits(
    config: VerifyConfig,
    comparison: Comparison,
    made: Direction,
    topology: Topology,
    examples: PackedExamples,
    runtime: Runtime,
) -> Check:
    """Compare logits (scores of a reward model) on the examples.

    Collective over the world; the same on every rank.

    Args:
        config: paths, topology and tolerance.
        comparison: the headers of both sides.
        made: which side was made from the other.
        topology: the division of the world by `config.parallel`.
        examples: token ids in packed micro-batches.
        runtime: the world.
    """
    spec = comparison.spec
    name = "logits" if spec.labels is None else "scores"
    if comparison.problems:
        return Check(name, "-", "-", "not compared", ("tensors are missing or of another shape, see above",))
    if spec.family in REMOTE_CODE:
        why = f"transformers has no {spec.family}, and the code that comes with HF checkpoints is never run"
        return Check(name, "-", "-", "not comparable", (why,))
    shortage = memory_shortage(runtime, topology, parameters=comparison.parameters, spec=spec, examples=examples)
    if shortage is not None:
        return Check(name, "-", "-", "not compared", (shortage,))
    found = compare_outputs(
        config.hf, config.checkpoint, topology, spec, examples, _rounding(comparison, made), runtime
    )
    if isinstance(found, str):
        return Check(name, "-", "-", "not compared", (found,))
    return _verdict(name, found, config, windows_not_exceeded(spec, examples))


def _rounding(comparison: Comparison, made: Direction) -> Rounding:
    """Choose a dtype for one side's weights, if `--dtype` gave the other side a single one."""
    stored, hf = comparison.stored_dtypes, comparison.hf_dtypes
    if made == "import":
        return Rounding(hf=next(iter(stored)) if len(stored) == 1 else None)
    return Rounding(ours=next(iter(hf)) if len(hf) == 1 else None)


def _verdict(name: str, found: Agreement, config: VerifyConfig, not_exceeded: Sequence[int]) -> Check:
    cut = config.parallel
    sizes = f"tensor {cut.tensor}, pipeline {cut.pipeline}" + (f", expert {cut.expert}" if cut.expert > 1 else "")
    compared = f"{found.positions} positions at {sizes}"
    if not_exceeded:
        compared += f", window of {' and '.join(map(str, not_exceeded))} not exceeded"
    difference = f"{found.difference:.3g} ({name} up to {found.largest:.3g})"
    if found.within(config.tolerance):
        return Check(name, compared, difference, "pass")
    limit = f"tolerance {config.tolerance:g} x max(1, {found.largest:.3g})"
    return Check(name, compared, difference, "FAIL", (f"{found.difference:.3g} at {found.worst}; {limit}",))


def read_examples(prompts: Path | None, checkpoint: Path, spec: ModelSpec) -> PackedExamples:
    """Read the user's prompts, each in a micro-batch of its own, or the built-in ones.

    Raises DataError.
    """
    if prompts is None:
        return built_in_examples(spec)
    return [[example] for example in _read_prompts(prompts, checkpoint, spec)]


def _read_prompts(path: Path, checkpoint: Path, spec: ModelSpec) -> list[Example]:
    """Tokenise a file of prompts with the checkpoint's tokenizer; see `VerifyConfig.prompts`.

    A prompt without candidates is divided: its first half is the prompt, and the rest, also
    reversed and cut short, are the candidates. Raises DataError for what cannot be read or is
    longer than the model allows.
    """
    tokenizer = load_tokenizer(tokenizer_path(checkpoint)).fitted_to(spec.vocab_size)
    examples = []
    for record in _read_records(path):
        example = _example(record, tokenizer)
        if example.longest > longest_example(spec):
            raise DataError(
                record.where,
                f"has {example.longest} tokens",
                expected=f"at most {longest_example(spec)}, for the model's {spec.max_positions} positions",
                fix="shorten the prompt",
            )
        examples.append(example)
    return examples


def _read_records(path: Path) -> list[SourceRecord]:
    if path.suffix == ".jsonl":
        return read_jsonl_records(path)
    try:
        lines = read_bounded(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            str(path),
            f"cannot be read ({error})",
            expected="a text file, or JSONL",
            fix="correct the path",
        ) from None
    records = [
        SourceRecord(f"{path}:{number}", f"line-{number}", {"prompt": line})
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise DataError(str(path), "holds no prompt", expected="a prompt in every line", fix="add prompts")
    return records


def _example(record: SourceRecord, tokenizer: Tokenizer) -> Example:
    prompt = prompt_text(record.where, record.fields)
    ids = tuple(tokenizer.encode_prompt(prompt))
    if not ids:
        raise DataError(record.where, "has no tokens", expected="a prompt of at least one token", fix="remove it")
    if "completions" in record.fields:
        texts = completion_texts(record.where, record.fields, "completions", prompt=prompt)
        return Example(ids, tuple(tuple(tokenizer.encode_completion(text, prompt=prompt)) for text in texts))
    half = -(-len(ids) // 2)
    rest = ids[half:] or ids
    return Example(ids[:half], (rest, rest[::-1], rest[: -(-len(rest) // 2)]))
