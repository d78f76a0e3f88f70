"""The `score` stage: a reward for every candidate of a rollout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, pstdev

from exo_megatron.config.stages import ScoreConfig
from exo_megatron.data.candidates import CANDIDATES_FILE, ROLLOUT_FILE
from exo_megatron.data.completions import ScorableRecord, read_scorable, write_scored
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.rewards.build import build_reward
from exo_megatron.rewards.records import score_records
from exo_megatron.stages.run import say
from exo_megatron.utils.files import write_json

SUMMARY_FILE = "score.json"


def run_score(config: ScoreConfig, runtime: Runtime) -> None:
    """Write OUTPUT/candidates.jsonl with rewards, a copy of rollout.json, and score.json.

    Collective over the world. Raises DataError for malformed candidates before the reward source is
    loaded, and RewardError.
    """
    records = read_scorable(config.candidates, tell=partial(say, runtime))
    source = build_reward(config.reward, runtime.device, partial(say, runtime))
    scored = score_records(records, source, runtime, batch_size=config.reward.batch_size, label="score")
    if scored is not None:
        write_scored(config.output / CANDIDATES_FILE, scored)
        _carry_rollout(config.candidates, config.output)
        summary = summarize_rewards(scored)
        write_json(config.output / SUMMARY_FILE, summary)
        print(
            f"rewards of {summary['candidates']} candidates of {summary['prompts']} prompts: "
            f"mean {summary['reward_mean']:.4f}, standard deviation {summary['reward_std']:.4f}, "
            f"{summary['equal_share']:.1%} of the groups have equal rewards only",
            flush=True,
        )


def summarize_rewards(records: Sequence[ScorableRecord]) -> dict[str, float]:
    """Compute mean and standard deviation of rewards, and the share of groups of equal ones.

    Such groups have nothing to learn from.
    """
    groups = [record.rewards or () for record in records]
    rewards = list(chain.from_iterable(groups))
    return {
        "prompts": len(groups),
        "candidates": len(rewards),
        "reward_mean": fmean(rewards),
        "reward_std": pstdev(rewards),
        "equal_share": fmean(len(set(group)) == 1 for group in groups),
    }


def _carry_rollout(candidates: Path, output: Path) -> None:
    """Copy rollout.json, which says how candidates were drawn, unless the user made them."""
    described = (candidates if candidates.is_dir() else candidates.parent) / ROLLOUT_FILE
    if described.is_file():
        shutil.copyfile(described, output / ROLLOUT_FILE)
