"""The `score` stage: a reward for every candidate of a rollout, shard by shard."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from exo_megatron import __version__
from exo_megatron.config.sections import CandidatesDataConfig
from exo_megatron.config.stages import CANDIDATES_DIRECTORY, ScoreConfig
from exo_megatron.data.candidates import ROLLOUT_FILE
from exo_megatron.data.completions import ScorableRecord, stored_record
from exo_megatron.data.dataset import judge_source, write_report
from exo_megatron.data.reading import Interpreter
from exo_megatron.data.scorable import Contents, Survey, join_surveys, read_known_shares, read_shares, survey
from exo_megatron.data.shards import Notes, RunShards, find_shards, link_only_shard, output_of
from exo_megatron.data.tally import Verdicts
from exo_megatron.parallel.ending import on_main
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.rewards.build import build_reward, identify_reward
from exo_megatron.rewards.records import own_part, score_records, score_share
from exo_megatron.rewards.source import RewardSource
from exo_megatron.rewards.summary import RewardSums, join_sums
from exo_megatron.stages.run import say, writing
from exo_megatron.utils.disk import check_space
from exo_megatron.utils.files import write_json
from exo_megatron.utils.progress import Progress

SUMMARY_FILE = "score.json"


def run_score(config: ScoreConfig, runtime: Runtime) -> None:
    """Write the shards of OUTPUT/candidates with rewards, a copy of rollout.json, score.json and data_report.json.

    Collective over the world. A process has the records of one shard in memory. Shards that an
    interrupted run on the same input and reward has finished are kept. Raises DataError for candidates
    that cannot be used and are not left out before the reward source is loaded, and RewardError.
    """
    rank, world = runtime.rank, runtime.world_size
    interpreter = Interpreter.of(config.data, "score")
    shares = read_shares(config.candidates, interpreter, lambda number: number % world == rank)
    gathered = runtime.gather_items([survey(share) for share in shares])
    contents = on_main(runtime, lambda: _judge(config, interpreter, gathered or []))
    for line in _describe(config, interpreter, contents):
        say(runtime, f"data: {line}")
    source = build_reward(config.reward, runtime.device, partial(say, runtime))
    work = on_main(runtime, lambda: writing(config.output, lambda: _plan(config, contents, world)))
    on_main(runtime, lambda: check_space(config.output, _least_bytes(config, work)))
    sums = runtime.gather_items(list(_score_shares(config, interpreter, runtime, source, work)))
    if sums is not None:
        kept = ((number, RewardSums(**notes)) for number, notes in work.finished.items())
        link_only_shard(config.output, work.shards)
        _conclude(config, dict([*kept, *sums]))


def _judge(config: ScoreConfig, interpreter: Interpreter, surveys: Sequence[Survey]) -> Contents:
    """Join the surveys, write the report on the data, and raise DataError if they cannot be used."""
    contents = join_surveys(surveys)
    write_report(config.output, str(config.candidates), contents.tally)
    judge_source(str(config.candidates), interpreter, contents.tally, Verdicts(config.data.on_invalid))
    return contents


def _describe(config: ScoreConfig, interpreter: Interpreter, contents: Contents) -> Iterator[str]:
    """Describe what the candidates were taken for, and what was left out."""
    yield interpreter.describe(str(config.candidates), contents.format, contents.tally.seen)
    yield from contents.tally.describe(str(config.candidates), first=None, temperature=None)


@dataclass(frozen=True)
class _Work:
    """The shards of the stage, and how the ranks divide them.

    Attributes:
        shards: the shards of the output.
        contents: the input.
        finished: notes of the shards that are finished already.
        alone: for each rank, the shards that it scores by itself; all have equally many.
        together: those that are left then, fewer than ranks, each of which all ranks score.
    """

    shards: RunShards
    contents: Contents
    finished: Mapping[int, Notes]
    alone: Sequence[Sequence[int]]
    together: Sequence[int]


def _plan(config: ScoreConfig, contents: Contents, world_size: int) -> _Work:
    """Find the finished shards of this run, remove all others, and divide the work. Called by one process."""
    run = "\n".join((__version__, contents.digest, identify_reward(config.reward), *_reading(config.data)))
    digest = hashlib.sha256(run.encode()).hexdigest()
    shards = RunShards(config.output / CANDIDATES_DIRECTORY, len(contents.completions), digest)
    finished = shards.take_over()
    left = [number for number in range(shards.count) if number not in finished]
    whole = len(left) - len(left) % world_size
    alone = [left[rank:whole:world_size] for rank in range(world_size)]
    return _Work(shards, contents, finished, alone, left[whole:])


def _reading(config: CandidatesDataConfig) -> Iterator[str]:
    """Yield the settings that decide what a record is scored as, where they are not the usual ones.

    `on_invalid` is none of them: where it matters, `error` writes no shard.
    """
    if config.columns or config.transcript != "text":
        yield json.dumps([config.columns, config.transcript], sort_keys=True)


def _least_bytes(config: ScoreConfig, work: _Work) -> int:
    """Return how much the shards that are left will need at least: those of the input, to which rewards are added.

    0 where that is not known: for other input than shards, and where records may be left out.
    """
    found = find_shards(config.candidates)
    if found is None or config.data.on_invalid != "error":
        return 0
    return sum(found[number].stat().st_size for number in (*chain(*work.alone), *work.together))


def _score_shares(
    config: ScoreConfig, interpreter: Interpreter, runtime: Runtime, source: RewardSource, work: _Work
) -> Iterator[tuple[int, RewardSums]]:
    """Score the shards that are not finished. Yields numbers and sums of those that this rank wrote."""
    alone, sizes = work.alone[runtime.rank], work.contents.completions
    wanted = {*alone, *work.together}
    total = sum(sizes[number] for number in alone)
    total += sum(len(own_part(sizes[number], runtime)) for number in work.together)
    names, batch_size = work.contents.names, config.reward.batch_size
    with Progress("score", total, "completions", enabled=runtime.is_main and total > 0) as progress:
        for share in read_known_shares(config.candidates, interpreter, work.contents, wanted):
            runtime.begin(f"score: shard {share.number}")
            scored: list[ScorableRecord] | None
            if share.number in alone:
                scored = score_share(share.records, source, names=names, batch_size=batch_size, progress=progress)
            else:
                scored = score_records(
                    share.records, source, runtime, names=names, batch_size=batch_size, progress=progress
                )
            if scored is not None:
                sums = RewardSums.of([record.rewards or () for record in scored])
                write = partial(work.shards.write, share.number, map(stored_record, scored), asdict(sums))
                writing(config.output, write)
                yield share.number, sums


def _conclude(config: ScoreConfig, sums: Mapping[int, RewardSums]) -> None:
    """Write what the stage says about all shards, in whose order the sums are joined."""
    _carry_rollout(config.candidates, config.output)
    summary = join_sums(sums[number] for number in sorted(sums)).summary()
    write_json(config.output / SUMMARY_FILE, summary)
    print(
        f"rewards of {summary['candidates']} candidates of {summary['prompts']} prompts: "
        f"mean {summary['reward_mean']:.4f}, standard deviation {summary['reward_std']:.4f}, "
        f"{summary['equal_share']:.1%} of the groups have equal rewards only",
        flush=True,
    )


def _carry_rollout(candidates: Path, output: Path) -> None:
    """Copy rollout.json, which says how candidates were drawn, unless the user made them."""
    described = output_of(candidates) / ROLLOUT_FILE
    if described.is_file():
        shutil.copyfile(described, output / ROLLOUT_FILE)
