"""Reading of records as prompts and candidate groups. All are checked before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from exo_megatron.config.losses import Compares, LossSpec
from exo_megatron.config.sections import DataConfig
from exo_megatron.config.stages import PairRule, TieRule
from exo_megatron.data.candidates import CandidateRecord, Columns, parse_candidate_record, prompt_context
from exo_megatron.data.groups import Group
from exo_megatron.data.loss_fields import check_token_logprobs, read_loss_fields
from exo_megatron.data.pairs import check_different, check_number, choose_pair, has_several
from exo_megatron.data.reading import describe_candidates, describe_group, read_source, shortened
from exo_megatron.data.records import SourceRecord, finite_numbers, text
from exo_megatron.data.stored_logprobs import WantedLogprobs, reference_logprobs
from exo_megatron.data.text import Answer, Chat, Text, completion_text, completion_texts, prompt_text
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import ConfigError, DataError, TieError

Purpose = Literal["sft"] | Compares

Choose = Callable[[SourceRecord, Sequence[float]], Sequence[int]]
"""Function that gets a record's K rewards and gives the numbers of the candidates of its group."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: the text that the model sees (chat messages rendered) and its token ids.

    There are P >= 1 ids, BOS included. `chat` is the conversation, None if the data has a
    string; `columns` are the fields of its record that are none of ours.
    """

    id: str
    text: str
    ids: tuple[int, ...]
    chat: Chat | None = None
    columns: Columns = field(default_factory=dict)


def load_prompts(
    config: DataConfig, tokenizer: Tokenizer, *, tell: Callable[[str], object] | None = None
) -> list[Prompt]:
    """Read the prompts of a data source of any layout, and their "id" if they have one.

    The prompts of a candidates file keep their stored ids. `tell` gets a line for each thing that the
    user should know about the data. Raises DataError for bad records and for a prompt longer than
    max_prompt_tokens.
    """
    encoder = _Encoder(tokenizer, config)
    reading = read_source(config, "prompts")
    prompts = [_prompt(record, encoder) for record in reading.records]
    if tell is not None:
        tell(f"data: {reading.description}")
        tell(f"data: the first is {shortened(tokenizer.show(prompts[0].ids))}")
    return prompts


def load_groups(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    purpose: Purpose,
    candidates: int | None = None,
    pairs: PairRule = "two_draws",
    ties: TieRule = "error",
    logprobs: WantedLogprobs | None = None,
    loss: LossSpec | None = None,
    temperature: float | None = None,
    tell: Callable[[str], object] | None = None,
) -> list[Group]:
    """Read candidate groups, in the order of the records.

    Args:
        config: the data source and its limits.
        tokenizer: converts texts to token ids. The ids of a candidates file are used as they are.
        purpose: "sft" reads K = 1 candidate from "chosen". "preference" reads the chosen one
            first and the rejected one, or several, or K = 2 of rewarded candidates as `pairs` says.
            "rewards" reads candidates with their rewards, from "completions" and "rewards" or from
            a scored candidates file.
        candidates: the number of first candidates that are read of every record; None for all.
        pairs: the pair that is made of rewarded candidates: the first two, or the best and the
            worst of those read (see `choose_pair`).
        ties: whether a pair in which neither candidate is preferred is an error or left out.
        logprobs: reference log-probs that groups get from records that have them; None to ignore
            stored log-probs.
        loss: the fields "log_weights", "reference_token_logprobs" and "behaviour_token_logprobs"
            are read if it needs them.
        temperature: that of the loss, which is compared with that of the rollout.
        tell: gets a line for each thing about the data that the user should know.

    Returns:
        One group per record that is not left out. Candidates that are in no group are not checked
        for their length.

    Raises:
        ConfigError: a setting of the pairs has no effect on this purpose.
        DataError: bad records, prompts and candidates over the limits of `config`, empty
            candidates, rewards that are not finite, too few candidates, ties, stored log-probs
            other than those wanted, and log-probs of single tokens in some records only.
    """
    _check_settings(purpose, candidates, pairs, ties)
    encoder = _Encoder(tokenizer, config, logprobs, loss)
    first = 2 if purpose == "preference" and pairs == "two_draws" else candidates
    build: Callable[[SourceRecord], Group] = {
        "sft": partial(_sft_group, encoder=encoder),
        "rewards": partial(_rewarded_group, encoder=encoder, choose=partial(_first_candidates, count=first)),
        "preference": partial(_preference_group, encoder=encoder, count=first, rule=pairs, most=candidates),
    }[purpose]
    reading = read_source(config, purpose)
    records = reading.records
    kept = list(_without_ties(records, build)) if ties == "skip" else [(record, build(record)) for record in records]
    groups = [group for _, group in kept]
    if not groups:
        raise _nothing_left(config.path, len(records))
    if tell is not None:
        example = describe_group(groups[0], tokenizer)
        for line in (
            reading.description,
            example,
            *describe_candidates(records, len(groups), config.path, first, temperature),
        ):
            tell(f"data: {line}")
    if loss is not None and loss.token_logps:
        check_token_logprobs([record for record, _ in kept], groups)
    return groups


def _nothing_left(path: str, count: int) -> DataError:
    return DataError(
        path,
        f"has {count} preference pairs, all of which are ties and left out (ties=skip)",
        expected="at least one pair of different texts with different rewards",
        fix="correct the rewards, or draw other candidates",
    )


def _without_ties(
    records: Sequence[SourceRecord], build: Callable[[SourceRecord], Group]
) -> Iterator[tuple[SourceRecord, Group]]:
    """Build the groups of records, and leave out those whose pair is a tie."""
    for record in records:
        with suppress(TieError):
            yield record, build(record)


def _check_settings(purpose: Purpose, candidates: int | None, pairs: PairRule, ties: TieRule) -> None:
    """Raise ConfigError for a setting without effect; `validate` does, too, for losses of the table."""
    for key, value, default in (("pairs", pairs, "two_draws"), ("ties", ties, "error")):
        if purpose != "preference" and value != default:
            raise ConfigError(
                key,
                f"got {value!r}, which has no effect: the loss compares rewards",
                expected="no such setting here",
                fix=f"remove {key}",
            )
    if purpose == "preference" and pairs == "two_draws" and candidates not in (None, 2):
        raise ConfigError(
            "candidates",
            f"got {candidates}, but the loss compares two and pairs is two_draws",
            expected="2 or null",
            fix="remove candidates, or set pairs=best_and_worst",
        )


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

    def completion(self, record: SourceRecord, name: str, completion: Answer, prompt: Text) -> tuple[int, ...]:
        with _located(record):
            ids = self.tokenizer.encode_completion(completion, prompt=prompt)
        return self.checked_completion(record, name, ids)

    def whole_text(self, record: SourceRecord) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the first token of the field "text", BOS where there is one, and what follows it.

        A group needs a prompt, and nothing predicts the first token of a text.
        """
        words = text(record.where, record.fields, "text")
        if not words.strip():
            raise DataError(record.where, "'text' is empty", expected="text", fix="remove the record")
        with _located(record):
            ids = self.tokenizer.encode_prompt(words)
        ended = ids if ids[-1] in self.tokenizer.stop_ids else [*ids, self.tokenizer.eos_id]
        return self.checked_prompt(record, ended[:1]), self.checked_completion(record, "text", ended[1:])

    def stored_logprobs(
        self, record: SourceRecord, stored: CandidateRecord, numbers: Sequence[int]
    ) -> tuple[float, ...] | None:
        return None if self.logprobs is None else reference_logprobs(record.where, stored, numbers, self.logprobs)

    def with_loss_fields(self, record: SourceRecord, group: Group, numbers: Sequence[int], size: int) -> Group:
        if self.loss is None or not (self.loss.log_weights or self.loss.token_logps):
            return group
        return read_loss_fields(record, group, self.loss, numbers, size)

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
        ids = encoder.checked_prompt(record, stored.prompt_ids)
        return Prompt(record.id, stored.prompt, ids, stored.chat, stored.columns)
    prompt = prompt_text(record.where, record.fields)
    ids = encoder.prompt(record, prompt)
    return Prompt(record.id, encoder.tokenizer.prompt_text(prompt), ids, *prompt_context(record.fields, prompt))


def _sft_group(record: SourceRecord, encoder: _Encoder) -> Group:
    if "text" in record.fields:
        first, rest = encoder.whole_text(record)
        return Group(record.id, first, (rest,))
    prompt = prompt_text(record.where, record.fields)
    chosen = completion_text(record.where, record.fields, "chosen", prompt=prompt)
    return Group(record.id, encoder.prompt(record, prompt), (encoder.completion(record, "chosen", chosen, prompt),))


def _rewarded_group(record: SourceRecord, encoder: _Encoder, choose: Choose) -> Group:
    build = _stored_group if "candidates" in record.fields else _completions_group
    return build(record, encoder, choose)


def _first_candidates(record: SourceRecord, rewards: Sequence[float], count: int | None) -> range:
    """Return the numbers of the first `count` candidates, or of all."""
    if len(rewards) < 2:
        raise DataError(
            record.where,
            f"has {len(rewards)} candidate",
            expected="at least 2: the loss compares candidates of one prompt",
            fix="draw more candidates (sampling.candidates), or remove the record",
        )
    if count is not None and len(rewards) < count:
        raise DataError(
            record.where,
            f"record {record.id!r} has {len(rewards)} candidates",
            expected=f"at least {count} (candidates)",
            fix="lower `candidates`, or leave it out to take all that a record has",
        )
    return range(len(rewards) if count is None else count)


def _preference_group(
    record: SourceRecord, encoder: _Encoder, count: int | None, rule: PairRule, most: int | None
) -> Group:
    if "candidates" in record.fields or "completions" in record.fields:

        def choose(record: SourceRecord, rewards: Sequence[float]) -> tuple[int, int]:
            numbers = _first_candidates(record, rewards, count)
            return choose_pair(record, [rewards[k] for k in numbers], rule)

        group = _rewarded_group(record, encoder, choose)
    else:
        group = _chosen_and_rejected(record, encoder, rule, most)
    check_different(record, group)
    return group


def _chosen_and_rejected(record: SourceRecord, encoder: _Encoder, rule: PairRule, most: int | None) -> Group:
    """Build the group of a chosen answer and one or several rejected ones, none of which is left out."""
    where, fields = record.where, record.fields
    prompt = prompt_text(where, fields)
    if rule != "two_draws":
        raise DataError(
            where,
            f"has 'chosen' and 'rejected', on which pairs={rule} has no effect",
            expected="rewarded candidates to choose a pair among",
            fix="remove pairs",
        )
    answers = {"chosen": completion_text(where, fields, "chosen", prompt=prompt)}
    if has_several(fields["rejected"]):
        rejected = completion_texts(where, fields, "rejected", prompt=prompt)
        answers |= {f"rejected[{k}]": each for k, each in enumerate(rejected)}
    else:
        answers["rejected"] = completion_text(where, fields, "rejected", prompt=prompt)
    check_number(where, len(answers), encoder.loss, most)
    candidates = tuple(encoder.completion(record, name, answer, prompt) for name, answer in answers.items())
    group = Group(record.id, encoder.prompt(record, prompt), candidates)
    return encoder.with_loss_fields(record, group, range(len(candidates)), len(candidates))


def _stored_group(record: SourceRecord, encoder: _Encoder, choose: Choose) -> Group:
    stored = parse_candidate_record(record)
    if stored.rewards is None:
        raise DataError(
            record.where,
            "has no 'rewards'",
            expected="candidates with rewards",
            fix="run `exo-megatron score` on the rollout and use its output",
        )
    numbers = choose(record, stored.rewards)
    group = Group(
        record.id,
        encoder.checked_prompt(record, stored.prompt_ids),
        tuple(encoder.checked_completion(record, f"candidates[{k}]", stored.candidates[k].token_ids) for k in numbers),
        rewards=tuple(stored.rewards[k] for k in numbers),
        reference_logprobs=encoder.stored_logprobs(record, stored, numbers),
    )
    return encoder.with_loss_fields(record, group, numbers, len(stored.candidates))


def _completions_group(record: SourceRecord, encoder: _Encoder, choose: Choose) -> Group:
    where, fields = record.where, record.fields
    prompt = prompt_text(record.where, record.fields)
    completions = completion_texts(where, fields, "completions", prompt=prompt)
    rewards = finite_numbers(where, fields, "rewards")
    if len(rewards) != len(completions):
        raise DataError(
            where,
            f"has {len(rewards)} rewards for {len(completions)} completions",
            expected="one reward per completion",
            fix="correct the record",
        )
    numbers = choose(record, rewards)
    group = Group(
        record.id,
        encoder.prompt(record, prompt),
        tuple(encoder.completion(record, f"completions[{k}]", completions[k], prompt) for k in numbers),
        rewards=tuple(rewards[k] for k in numbers),
    )
    return encoder.with_loss_fields(record, group, numbers, len(completions))
