"""Reading of records as prompts and candidate groups. All are checked before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from exo_megatron.config.losses import Compares, LossSpec, kinds_comparing
from exo_megatron.config.sections import DataConfig
from exo_megatron.data.candidates import CandidateRecord, parse_candidate_record
from exo_megatron.data.groups import Group
from exo_megatron.data.records import (
    SourceRecord,
    completion_text,
    completion_texts,
    finite_number_lists,
    finite_numbers,
    prompt_text,
    read_records,
)
from exo_megatron.data.stored_logprobs import WantedLogprobs, reference_logprobs
from exo_megatron.data.text import Text
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import DataError

Purpose = Literal["sft"] | Compares

TOKEN_LOGPROBS = ("reference_token_logprobs", "behaviour_token_logprobs")
"""Fields of a record, and of Group, with log-probs of single tokens."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: the text that the model sees (chat messages rendered) and its token ids.

    There are P >= 1 ids, BOS included.
    """

    id: str
    text: str
    ids: tuple[int, ...]


def load_prompts(config: DataConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """Read the prompts of a data source from the field "prompt", and from "id" if there is one.

    The prompts of a candidates file keep their stored ids. Raises DataError for bad records and for
    a prompt longer than max_prompt_tokens.
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
    loss: LossSpec | None = None,
) -> list[Group]:
    """Read candidate groups, in the order of the records.

    Args:
        config: the data source and its limits.
        tokenizer: converts texts to token ids. The ids of a candidates file are used as they are.
        purpose: "sft" reads K = 1 candidate from "chosen". "preference" reads K = 2, the chosen one
            first, from "chosen" and "rejected" or from the best and the worst (first of equals) of
            rewarded candidates. "rewards" reads all candidates with their rewards, from
            "completions" and "rewards" or from a scored candidates file.
        candidates: number of candidates that every record must have; None for any number from 2 on.
        logprobs: reference log-probs that groups get from records that have them; None to ignore
            stored log-probs.
        loss: the fields "log_weights", "reference_token_logprobs" and "behaviour_token_logprobs"
            are read if it needs them.

    Returns:
        One group per record.

    Raises:
        DataError: bad records, prompts and candidates over the limits of `config`, empty
            candidates, rewards that are not finite, a wrong number of candidates, preferences
            between equal rewards, stored log-probs other than those wanted, and log-probs of single
            tokens in some records only.
    """
    encoder = _Encoder(tokenizer, config, logprobs, loss)
    build: Callable[[SourceRecord], Group] = {
        "sft": lambda record: _sft_group(record, encoder),
        "rewards": lambda record: _rewarded_group(record, encoder, candidates),
        "preference": lambda record: _preference_group(record, encoder, candidates),
    }[purpose]
    records = read_records(config.path, split=config.split, limit=config.limit)
    groups = [build(record) for record in records]
    if loss is not None and loss.token_logps:
        _check_token_logprobs(records, groups)
    return groups


class _Encoder:
    """A converter of texts to checked token ids, and of stored log-probs to wanted ones.

    It never shortens a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: DataConfig,
        logprobs: WantedLogprobs | None = None,
        loss: LossSpec | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.logprobs = logprobs
        self.loss = loss

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
    """Add the place of the record to errors of the tokenizer."""
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
    return _with_loss_fields(record, group, encoder)


def _with_loss_fields(record: SourceRecord, group: Group, encoder: _Encoder) -> Group:
    """Read the further fields of the loss: a value per candidate, or values per token."""
    if encoder.loss is None:
        return group
    where, fields, loss = record.where, record.fields, encoder.loss
    if loss.log_weights:
        weights = finite_numbers(where, fields, "log_weights")
        _check_length(where, "log_weights", len(weights), len(group.candidates))
        group = replace(group, log_weights=weights)
    if loss.token_logps:
        reference, behaviour = (_token_logprobs(record, group, name) for name in TOKEN_LOGPROBS)
        group = replace(group, reference_token_logprobs=reference, behaviour_token_logprobs=behaviour)
    return group


def _token_logprobs(record: SourceRecord, group: Group, name: str) -> tuple[tuple[float, ...], ...] | None:
    """Read the log-probs of every token of every candidate; None if the record has none."""
    if name not in record.fields:
        return None
    values = finite_number_lists(record.where, record.fields, name)
    _check_length(record.where, name, len(values), len(group.candidates))
    for k, (per_token, candidate) in enumerate(zip(values, group.candidates, strict=True)):
        _check_length(record.where, f"{name}[{k}]", len(per_token), len(candidate))
    return values


def _check_token_logprobs(records: Sequence[SourceRecord], groups: Sequence[Group]) -> None:
    """Raise DataError if some records have log-probs of single tokens and others have none.

    The loss would otherwise get them in some micro-batches and not in others.
    """
    for name in TOKEN_LOGPROBS:
        has = [vars(group)[name] is not None for group in groups]
        if any(has) and not all(has):
            lacking = records[has.index(False)]
            raise DataError(
                lacking.where,
                f"has no {name!r}, but {records[has.index(True)].where} has",
                expected="the field in every record, or in none",
                fix=f"add {name!r} to the record, or remove it from all",
            )


def _check_length(where: str, name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(where, f"{name!r} has {found} values", expected=f"{wanted}", fix="correct the record")


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
    return _with_loss_fields(record, Group(record.id, encoder.prompt(record, prompt), (chosen, rejected)), encoder)


def _best_and_worst(record: SourceRecord, group: Group) -> Group:
    """Take the candidates with the highest and the lowest reward, in this order.

    Raises DataError if all rewards or both texts are equal.
    """
    rewards = group.rewards or ()
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    if rewards[best] == rewards[worst]:
        raise DataError(
            record.where,
            f"all candidates of record {record.id!r} have reward {rewards[best]}, so none is preferred",
            expected="different rewards for a preference loss",
            fix="remove the record, or use a loss.kind for which equal rewards are legitimate: "
            f"{kinds_comparing('rewards')}",
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
            fix=f"use loss.kind {kinds_comparing('preference')} for preference pairs",
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
