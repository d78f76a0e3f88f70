"""Candidate groups of records in our own fields: chosen answers, preferences, and candidates with rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from exo_megatron.config.losses import Compares, LossSpec
from exo_megatron.config.stages import PairRule
from exo_megatron.data.building import Draft, Limits
from exo_megatron.data.candidates import parse_candidate_record
from exo_megatron.data.groups import Group
from exo_megatron.data.loss_fields import TOKEN_LOGPROBS, read_loss_fields
from exo_megatron.data.pairs import check_different, check_number, choose_pair, has_several
from exo_megatron.data.records import SourceRecord, finite_numbers, text
from exo_megatron.data.stored_logprobs import WantedLogprobs, reference_logprobs
from exo_megatron.data.tally import Tally
from exo_megatron.data.text import completion_text, completion_texts, prompt_text
from exo_megatron.data.tokenizer import EncodedGroup, Tokenizer
from exo_megatron.errors import DataError, EmptyError

Purpose = Literal["sft"] | Compares

DUPLICATES = "groups have the same candidate more than once"
NO_CONTRAST = "groups have equal rewards only, from which nothing is learned but to stay with the reference"


@dataclass(frozen=True)
class GroupBuilder:
    """A builder of groups for one purpose; see `load_groups` for the settings."""

    limits: Limits
    purpose: Purpose
    candidates: int | None
    pairs: PairRule
    logprobs: WantedLogprobs | None
    loss: LossSpec | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the texts."""
        return self.limits.tokenizer

    @property
    def first(self) -> int | None:
        """The number of first candidates that are read of every record; None for all."""
        return 2 if self.purpose == "preference" and self.pairs == "two_draws" else self.candidates

    def draft(self, record: SourceRecord, tally: Tally) -> Draft[Group] | Group:
        """Return the group of stored candidates, or a draft. Raises DataError."""
        if self.purpose == "sft":
            return self._demonstration(record, tally)
        if "candidates" in record.fields:
            return self._stored(record, tally)
        if "completions" in record.fields or self.purpose == "rewards":
            return self._completions(record, tally)
        return self._preference(record, tally)

    def note(self, where: str, item: Group, tally: Tally) -> None:
        """Count groups with the same candidate twice, with equal rewards, and with log-probs of single tokens."""
        if len(set(item.candidates)) < len(item.candidates):
            tally.remarks[DUPLICATES] += 1
        if item.rewards is not None and len(item.rewards) > 1 and len(set(item.rewards)) == 1:
            tally.remarks[NO_CONTRAST] += 1
        if self.loss is not None and self.loss.token_logps:
            for name in TOKEN_LOGPROBS:
                tally.add_field(name, where, present=vars(item)[name] is not None)

    def _demonstration(self, record: SourceRecord, tally: Tally) -> Draft[Group]:
        """Build a group of a prompt and its one answer, or of a whole text."""
        if "text" in record.fields:
            return self._whole_text(record)
        prompt = prompt_text(record.where, record.fields)
        chosen = completion_text(record.where, record.fields, "chosen", prompt=prompt)
        return Draft(prompt, {"chosen": chosen}, lambda encoded: self._group(record, encoded, ["chosen"], tally))

    def _whole_text(self, record: SourceRecord) -> Draft[Group]:
        """Take the first token of a text, BOS where there is one, as the prompt of what follows it.

        A group needs a prompt, and nothing predicts the first token of a text.
        """
        words = text(record.where, record.fields, "text")
        if not words.strip():
            raise EmptyError(record.where, "'text' is empty", expected="text", fix="remove the record")

        def finish(encoded: EncodedGroup) -> Group:
            ids = encoded.prompt
            ended = ids if ids[-1] in self.tokenizer.stop_ids else [*ids, self.tokenizer.eos_id]
            prompt = self.limits.prompt(record, ended[:1])
            return Group(record.id, prompt, (self.limits.completion(record, "text", ended[1:]),))

        return Draft(words, {}, finish)

    def _preference(self, record: SourceRecord, tally: Tally) -> Draft[Group]:
        """Build the group of a chosen answer and one or several rejected ones, none of which is left out."""
        where, fields = record.where, record.fields
        prompt = prompt_text(where, fields)
        if self.pairs != "two_draws":
            raise DataError(
                where,
                f"has 'chosen' and 'rejected', on which pairs={self.pairs} has no effect",
                expected="rewarded candidates to choose a pair among",
                fix="remove pairs",
            )
        answers = {"chosen": completion_text(where, fields, "chosen", prompt=prompt)}
        if has_several(fields["rejected"]):
            rejected = completion_texts(where, fields, "rejected", prompt=prompt)
            answers |= {f"rejected[{k}]": each for k, each in enumerate(rejected)}
        else:
            answers["rejected"] = completion_text(where, fields, "rejected", prompt=prompt)
        check_number(where, len(answers), self.loss, self.candidates)

        def finish(encoded: EncodedGroup) -> Group:
            group = self._group(record, encoded, list(answers), tally)
            check_different(record, group)
            return self._with_loss_fields(record, group, range(len(answers)), len(answers))

        return Draft(prompt, answers, finish)

    def _stored(self, record: SourceRecord, tally: Tally) -> Group:
        """Build the group of stored candidates, whose ids are used as they are."""
        stored = parse_candidate_record(record)
        tally.sizes[len(stored.candidates)] += 1
        source = stored.logprob_source
        tally.temperatures[None if source is None else source.temperature] += 1
        if stored.rewards is None:
            raise DataError(
                record.where,
                "has no 'rewards'",
                expected="candidates with rewards",
                fix="run `exo-megatron score` on the rollout and use its output",
            )
        numbers = self._chosen_numbers(record, stored.rewards)
        group = Group(
            record.id,
            self.limits.prompt(record, stored.prompt_ids),
            tuple(self.limits.completion(record, f"candidates[{k}]", stored.candidates[k].token_ids) for k in numbers),
            rewards=tuple(stored.rewards[k] for k in numbers),
            reference_logprobs=None
            if self.logprobs is None
            else reference_logprobs(record.where, stored, numbers, self.logprobs),
        )
        if self.purpose == "preference":
            check_different(record, group)
        return self._with_loss_fields(record, group, numbers, len(stored.candidates))

    def _completions(self, record: SourceRecord, tally: Tally) -> Draft[Group]:
        """Build the group of texts with rewards."""
        where, fields = record.where, record.fields
        prompt = prompt_text(where, fields)
        completions = completion_texts(where, fields, "completions", prompt=prompt)
        tally.sizes[len(completions)] += 1
        rewards = finite_numbers(where, fields, "rewards")
        if len(rewards) != len(completions):
            raise DataError(
                where,
                f"has {len(rewards)} rewards for {len(completions)} completions",
                expected="one reward per completion",
                fix="correct the record",
            )
        numbers = self._chosen_numbers(record, rewards)
        answers = {f"completions[{k}]": completions[k] for k in numbers}

        def finish(encoded: EncodedGroup) -> Group:
            group = self._group(record, encoded, list(answers), tally, tuple(rewards[k] for k in numbers))
            if self.purpose == "preference":
                check_different(record, group)
            return self._with_loss_fields(record, group, numbers, len(completions))

        return Draft(prompt, answers, finish)

    def _chosen_numbers(self, record: SourceRecord, rewards: Sequence[float]) -> Sequence[int]:
        """Return the numbers of the candidates of the group: the first ones, or of a pair the better one first."""
        numbers = _first_candidates(record, rewards, self.first)
        return (
            choose_pair(record, [rewards[k] for k in numbers], self.pairs) if self.purpose == "preference" else numbers
        )

    def _group(
        self,
        record: SourceRecord,
        encoded: EncodedGroup,
        names: Sequence[str],
        tally: Tally,
        rewards: tuple[float, ...] | None = None,
    ) -> Group:
        answers = zip(names, encoded.answers, strict=True)
        candidates = tuple(self.limits.completion(record, name, ids) for name, ids in answers)
        return Group(record.id, self.limits.prompt(record, encoded.prompt, tally), candidates, rewards=rewards)

    def _with_loss_fields(self, record: SourceRecord, group: Group, numbers: Sequence[int], size: int) -> Group:
        if self.loss is None or not (self.loss.log_weights or self.loss.token_logps):
            return group
        return read_loss_fields(record, group, self.loss, numbers, size)


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
