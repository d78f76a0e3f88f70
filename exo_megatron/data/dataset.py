"""From records to prompts and candidate groups. Everything is read and checked before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from exo_megatron.config.sections import DataConfig
from exo_megatron.data.candidates import CandidateRecord, parse_candidate_record
from exo_megatron.data.fields import completion_text, completion_texts, finite_numbers, prompt_text
from exo_megatron.data.groups import Group
from exo_megatron.data.records import SourceRecord, read_records
from exo_megatron.data.stored_logprobs import WantedLogprobs, reference_logprobs
from exo_megatron.data.tokenizer import Text, Tokenizer
from exo_megatron.errors import DataError

Purpose = Literal["sft", "rewards", "preference"]


@dataclass(frozen=True)
class Prompt:
    """One prompt. text: as the model sees it, so chat messages rendered. ids: P >= 1 token ids, BOS included."""

    id: str
    text: str
    ids: tuple[int, ...]


def load_prompts(config: DataConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """Read the prompts of a data source; only the field "prompt" is needed, and "id" used where there is one.

    The prompts of a candidates file keep their stored ids. Raises DataError for bad records and for a prompt
    longer than max_prompt_tokens.
    """
    encoder = _Encoder(tokenizer, config)
    records = read_records(config.path, split=config.split, limit=config.limit)
    return [_prompt(record, encoder) for record in records]


def load_groups(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    purpose: Purpose,
    candidates: int | None = None,
    logprobs: WantedLogprobs | None = None,
) -> list[Group]:
    """Read candidate groups, in the order of the records.

    purpose "sft": K = 1, from "chosen". "preference": K = 2, chosen first, from "chosen" and "rejected" or from the
    best and the worst (first of equals) of rewarded completions. "rewards": all completions with their rewards,
    from "completions" and "rewards" or from a scored candidates file, whose token ids are used as they are.
    candidates: the number that every record must have; default any, from 2 on. logprobs: the reference log-probs that
    groups get from records that have them; default: stored log-probs are not looked at.

    Raises DataError for bad records, prompts and completions over the limits of `config`, empty completions,
    rewards that are not finite, numbers of candidates that do not fit, preferences between equal rewards, and stored
    log-probs other than those wanted.
    """
    encoder = _Encoder(tokenizer, config, logprobs)
    build: Callable[[SourceRecord], Group] = {
        "sft": lambda record: _sft_group(record, encoder),
        "rewards": lambda record: _rewarded_group(record, encoder, candidates),
        "preference": lambda record: _preference_group(record, encoder, candidates),
    }[purpose]
    return [build(record) for record in read_records(config.path, split=config.split, limit=config.limit)]


class _Encoder:
    """Tokenises the texts of records and holds what they bring to what is wanted; never shortens anything."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, logprobs: WantedLogprobs | None = None) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.logprobs = logprobs

    def prompt(self, record: SourceRecord, prompt: Text) -> tuple[int, ...]:
        with _located(record):
            ids = self.tokenizer.encode_prompt(prompt)
        return self.checked_prompt(record, ids)

    def completion(self, record: SourceRecord, name: str, completion: Text) -> tuple[int, ...]:
        with _located(record):
            ids = self.tokenizer.encode_completion(completion)
        return self.checked_completion(record, name, ids)

    def stored_logprobs(self, record: SourceRecord, stored: CandidateRecord) -> tuple[float, ...] | None:
        return None if self.logprobs is None else reference_logprobs(record.where, stored, self.logprobs)

    def checked_prompt(self, record: SourceRecord, ids: Sequence[int]) -> tuple[int, ...]:
        limit = self.config.max_prompt_tokens
        if not ids:
            raise DataError(record.where, "'prompt' is empty", expected="at least one token", fix="remove the record")
        return self._checked(record, "prompt", ids, limit, "data.max_prompt_tokens")

    def checked_completion(self, record: SourceRecord, name: str, ids: Sequence[int]) -> tuple[int, ...]:
        limit = self.config.max_completion_tokens
        return self._checked(record, name, ids, limit, "data.max_completion_tokens")

    def _checked(self, record: SourceRecord, name: str, ids: Sequence[int], limit: int, key: str) -> tuple[int, ...]:
        if len(ids) > limit:
            raise DataError(
                record.where,
                f"{name!r} of record {record.id!r} has {len(ids)} tokens",
                expected=f"at most {limit} ({key}, special tokens included)",
                fix=f"raise {key}, or shorten or remove the record",
            )
        if max(ids) >= self.tokenizer.vocab_size:
            raise DataError(
                record.where,
                f"{name!r} has token id {max(ids)}",
                expected=f"ids below {self.tokenizer.vocab_size}, which tokenizer {self.tokenizer.path} and model have",
                fix="use the tokenizer that made the file (data.tokenizer), or remove what the model has no token for",
            )
        return tuple(ids)


@contextmanager
def _located(record: SourceRecord) -> Iterator[None]:
    """Say at which record the tokenizer met with an error."""
    try:
        yield
    except DataError as error:
        problem = f"{error.problem} ({error.where})"
        raise DataError(record.where, problem, expected=error.expected, fix=error.fix) from None


def _prompt(record: SourceRecord, encoder: _Encoder) -> Prompt:
    if "candidates" in record.fields:
        stored = parse_candidate_record(record)
        return Prompt(record.id, stored.prompt, encoder.checked_prompt(record, stored.prompt_ids))
    prompt = prompt_text(record.where, record.fields)
    ids = encoder.prompt(record, prompt)
    return Prompt(record.id, encoder.tokenizer.prompt_text(prompt), ids)


def _sft_group(record: SourceRecord, encoder: _Encoder) -> Group:
    prompt = _prompt_of(record)
    chosen = completion_text(record.where, record.fields, "chosen", prompt=prompt)
    return Group(record.id, encoder.prompt(record, prompt), (encoder.completion(record, "chosen", chosen),))


def _rewarded_group(record: SourceRecord, encoder: _Encoder, count: int | None) -> Group:
    if "candidates" in record.fields:
        group = _stored_group(record, parse_candidate_record(record), encoder)
    else:
        group = _completions_group(record, encoder)
    size = len(group.candidates)
    if size < 2:
        raise DataError(
            record.where,
            f"has {size} candidate",
            expected="at least 2: the loss compares candidates of one prompt",
            fix="draw more candidates (sampling.candidates), or remove the record",
        )
    _check_count(record, size, count)
    return group


def _preference_group(record: SourceRecord, encoder: _Encoder, count: int | None) -> Group:
    if "candidates" in record.fields or "completions" in record.fields:
        return _best_and_worst(record, _rewarded_group(record, encoder, count))
    prompt = _prompt_of(record)
    chosen, rejected = (
        encoder.completion(record, name, completion_text(record.where, record.fields, name, prompt=prompt))
        for name in ("chosen", "rejected")
    )
    _check_count(record, 2, count)
    _check_different(record, chosen, rejected)
    return Group(record.id, encoder.prompt(record, prompt), (chosen, rejected))


def _best_and_worst(record: SourceRecord, group: Group) -> Group:
    """The pair that the rewards prefer most clearly."""
    rewards = group.rewards or ()
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    if rewards[best] == rewards[worst]:
        raise DataError(
            record.where,
            f"all candidates of record {record.id!r} have reward {rewards[best]}, so none is preferred",
            expected="different rewards for a preference loss",
            fix="remove the record, or use loss.kind exo_rw or dpo_rw, for which equal rewards are legitimate",
        )
    _check_different(record, group.candidates[best], group.candidates[worst])
    return group.take((best, worst))


def _stored_group(record: SourceRecord, stored: CandidateRecord, encoder: _Encoder) -> Group:
    if stored.rewards is None:
        raise DataError(
            record.where,
            "has no 'rewards'",
            expected="candidates with rewards",
            fix="run `exo-megatron score` on the rollout and use its output",
        )
    ids = tuple(
        encoder.checked_completion(record, f"candidates[{k}]", candidate.token_ids)
        for k, candidate in enumerate(stored.candidates)
    )
    return Group(
        record.id,
        encoder.checked_prompt(record, stored.prompt_ids),
        ids,
        rewards=stored.rewards,
        reference_logprobs=encoder.stored_logprobs(record, stored),
    )


def _completions_group(record: SourceRecord, encoder: _Encoder) -> Group:
    where, fields = record.where, record.fields
    if "chosen" in fields and "completions" not in fields:
        raise DataError(
            where,
            "has 'chosen' but no 'completions' with 'rewards'",
            expected="completions and rewards for a reward loss",
            fix="use loss.kind exo_pref or dpo_pref for preference pairs",
        )
    prompt = _prompt_of(record)
    completions = completion_texts(where, fields, "completions", prompt=prompt)
    rewards = finite_numbers(where, fields, "rewards")
    if len(rewards) != len(completions):
        raise DataError(
            where,
            f"has {len(rewards)} rewards for {len(completions)} completions",
            expected="one reward per completion",
            fix="correct the record",
        )
    ids = tuple(encoder.completion(record, f"completions[{k}]", text) for k, text in enumerate(completions))
    return Group(record.id, encoder.prompt(record, prompt), ids, rewards=rewards)


def _prompt_of(record: SourceRecord) -> Text:
    if "prompt" not in record.fields and {"chosen", "rejected"} <= set(record.fields):
        raise DataError(
            record.where,
            "has 'chosen' and 'rejected' but no 'prompt': they are probably whole dialogues",
            expected="prompt, chosen and rejected apart",
            fix="split both after their common beginning (HH-RLHF: after the last '\\n\\nAssistant:') and add 'prompt'",
        )
    return prompt_text(record.where, record.fields)


def _check_count(record: SourceRecord, size: int, count: int | None) -> None:
    if count is not None and size != count:
        raise DataError(
            record.where,
            f"record {record.id!r} has {size} candidates",
            expected=f"{count} (candidates)",
            fix="correct `candidates`, or leave it out to allow different numbers",
        )


def _check_different(record: SourceRecord, chosen: tuple[int, ...], rejected: tuple[int, ...]) -> None:
    if chosen == rejected:
        raise DataError(
            record.where,
            f"chosen and rejected of record {record.id!r} are the same text",
            expected="two different completions",
            fix="remove the record",
        )
