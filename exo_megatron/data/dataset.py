"""Reading of a data source as prompts and candidate groups. All are checked before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from exo_megatron.config.losses import LossSpec
from exo_megatron.config.sections import DataConfig
from exo_megatron.config.stages import PairRule, TieRule
from exo_megatron.data.building import Builder, Limits, build_items
from exo_megatron.data.cache import Recipe, prepare
from exo_megatron.data.entries import SourceEntry
from exo_megatron.data.group_builder import GroupBuilder, Purpose
from exo_megatron.data.prepared import (
    GroupTable,
    ItemTable,
    Prepared,
    PreparedGroups,
    PromptTable,
    groups_digest,
    groups_table,
    prompts_digest,
    prompts_table,
)
from exo_megatron.data.prompts import Prompt, PromptBuilder
from exo_megatron.data.reading import Interpreter, describe_group, shortened
from exo_megatron.data.record_layouts import Use
from exo_megatron.data.sources import open_source
from exo_megatron.data.stored_logprobs import WantedLogprobs
from exo_megatron.data.tally import Tally, Verdicts
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import ConfigError
from exo_megatron.utils.files import write_json
from exo_megatron.utils.team import ALONE, Team

Item = TypeVar("Item")

DATA_REPORT = "data_report.json"
"""What was read, and what of it was left out, in a stage's output."""


def load_prompts(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    tell: Callable[[str], object] | None = None,
    report: Path | None = None,
    team: Team = ALONE,
) -> Prepared[Prompt]:
    """Read the prompts of a data source of any layout, and their "id" if they have one.

    The prompts of a candidates file keep their stored ids. Collective over the team.

    Args:
        config: the data source, its limits, and what is to be done about records that cannot be used.
        tokenizer: converts texts to token ids.
        tell: gets a line for each thing that the user should know about the data.
        report: directory that gets a DATA_REPORT.
        team: the processes that tokenise together.

    Raises:
        DataError: bad records, and prompts longer than max_prompt_tokens, as far as they are not left out.
        ConfigError: settings that do not fit the data, or a cache that cannot be written.
    """
    builder = PromptBuilder(Limits(tokenizer, config))
    work = _Work(config, "prompts", builder, prompts_table, PromptTable, prompts_digest)
    prompts, tally = work.prepare({}, Verdicts(config.on_invalid, config.on_overlong), report, team)
    if tell is not None:
        example = f"the first is {shortened(tokenizer.show(prompts[0].ids))}"
        for line in work.describe(tally, example, first=None, temperature=None):
            tell(f"data: {line}")
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
    report: Path | None = None,
    team: Team = ALONE,
) -> PreparedGroups:
    """Read candidate groups, in the order of the records.

    Collective over the team.

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
        report: directory that gets a DATA_REPORT.
        team: the processes that tokenise together.

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
    builder = GroupBuilder(Limits(tokenizer, config), purpose, candidates, pairs, logprobs, loss)
    settings = {
        "candidates": candidates,
        "pairs": pairs,
        "logprobs": None if logprobs is None else {**asdict(logprobs.source), "checkpoint": str(logprobs.checkpoint)},
        "loss": None if loss is None else [loss.several_rejected, loss.log_weights, loss.token_logps],
    }
    work = _Work(config, purpose, builder, groups_table, GroupTable, groups_digest)
    stored, tally = work.prepare(settings, Verdicts(config.on_invalid, config.on_overlong, ties), report, team)
    groups = PreparedGroups(stored)
    if tell is not None:
        example = describe_group(groups[0], tokenizer)
        for line in work.describe(tally, example, first=builder.first, temperature=temperature):
            tell(f"data: {line}")
    return groups


def write_report(output: Path, source: str, tally: Tally) -> None:
    """Write what was counted in a source to the DATA_REPORT of a stage's output."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / DATA_REPORT, {"source": source, **tally.as_json()})


def judge_source(source: str, interpreter: Interpreter, tally: Tally, verdicts: Verdicts) -> None:
    """Raise what the counts of a source say: ConfigError for a column that it lacks, DataError as the verdicts are."""
    interpreter.check_columns(source, tally.seen)
    tally.judge(source, verdicts)


class _Work(Generic[Item]):
    """The conversion of one data source into tables of items.

    It reads the source with the settings of `data`, converts records with a builder, stores items
    with `store`, reads rows with `open_table` and computes the digest of all tables with `digest`.
    """

    def __init__(
        self,
        config: DataConfig,
        use: Use,
        builder: Builder[Item],
        store: Callable[[Sequence[tuple[str, Item]]], pa.RecordBatch],
        open_table: Callable[[pa.RecordBatch], ItemTable[Item]],
        digest: Callable[[Sequence[pa.RecordBatch]], str],
    ) -> None:
        self._config = config
        self._interpreter = Interpreter.of(config, use)
        self._source = open_source(config.path, split=config.split, revision=config.revision, subset=config.subset)
        self._builder = builder
        self._store = store
        self._open_table = open_table
        self._digest = digest

    def prepare(
        self, settings: Mapping[str, Any], verdicts: Verdicts, report: Path | None, team: Team
    ) -> tuple[Prepared[Item], Tally]:
        """Make or find the items, and judge what was counted. Collective over the team.

        `settings` are those of the builder that decide what it makes.
        """
        recipe = Recipe(
            self._source,
            self._config.limit,
            {**self._settings(), **settings},
            self._make,
            self._digest,
        )
        shelf = prepare(recipe, self._config.cache, team)
        if report is not None and team.rank == 0:
            write_report(report, self._source.name, shelf.tally)
        judge_source(self._source.name, self._interpreter, shelf.tally, verdicts)
        return Prepared(shelf.tables, self._open_table, shelf.digest), shelf.tally

    def describe(self, tally: Tally, example: str, *, first: int | None, temperature: float | None) -> Iterator[str]:
        """Describe what the source was taken for, the first item, and what a user should know."""
        yield self._interpreter.describe(self._source.name, self._source.format, tally.seen)
        yield example
        yield from tally.describe(self._config.path, first=first, temperature=temperature)

    def _make(self, entries: Sequence[SourceEntry]) -> tuple[pa.RecordBatch, Tally]:
        items, tally = build_items(entries, self._interpreter, self._builder)
        return self._store(items), tally

    def _settings(self) -> dict[str, Any]:
        """Return the settings of `data` that decide what becomes of a record, and the tokenizer."""
        config = self._config
        return {
            "path": config.path,
            "split": config.split,
            "revision": config.revision,
            "subset": config.subset,
            "interpreter": asdict(self._interpreter),
            "limits": [config.max_prompt_tokens, config.max_completion_tokens],
            "truncates": config.on_overlong == "truncate_prompt_left",
            "tokenizer": self._builder.tokenizer.digest,
        }


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
