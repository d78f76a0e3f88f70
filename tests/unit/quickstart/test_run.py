"""The quickstart's pipeline, script and closing words, without running a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quickstart.finish import compare, describe
from quickstart.prepare import LONGEST_COMPLETION

from exo_megatron.config.load import load_run_config
from exo_megatron.config.stages import AlignConfig, EvaluateConfig, RolloutConfig, SftConfig
from exo_megatron.evaluation.estimates import PromptMeans

DIRECTORY = Path(__file__).parents[3] / "examples" / "quickstart"
SUMMARY = {
    "sft": {"reward": 0.1, "reward_stderr": 0.03, "kl": 0.0, "kl_stderr": 0.0, "prompts": 320},
    "exo": {"reward": 0.6, "reward_stderr": 0.04, "kl": 1.25, "kl_stderr": 0.05, "prompts": 320},
    "dpo": {"reward": -0.1, "reward_stderr": 0.04, "kl": 1.0, "kl_stderr": 0.03, "prompts": 320},
}


def test_pipeline_is_valid_and_its_stages_fit_each_other() -> None:
    run = load_run_config(DIRECTORY / "workflow.yaml", ["output=somewhere", "seed=5", "stages.sft.batch.epochs=6"])
    stages = {stage.name: stage for stage in run.stages}
    sft, rollout, exo, dpo, evaluate = (
        stages[name].config for name in ("sft", "rollout", "align_exo", "align_dpo", "evaluate")
    )
    assert isinstance(sft, SftConfig) and isinstance(rollout, RolloutConfig) and isinstance(evaluate, EvaluateConfig)
    assert isinstance(exo, AlignConfig) and isinstance(dpo, AlignConfig)
    assert sft.seed == 5 and sft.batch.epochs == 6 and sft.data.path == "somewhere/inputs/sft.jsonl"
    # EXO and DPO differ in the loss only.
    same = {"output": exo.output, "loss": exo.loss}
    assert dpo.model_copy(update=same) == exo
    assert (exo.loss.kind, dpo.loss.kind) == ("exo_rw", "dpo_rw")
    assert exo.loss.temperature == rollout.sampling.temperature == evaluate.sampling.temperature
    # So that the log-probs that the rollout stores are the reference's.
    assert exo.reference_logprobs == "stored" and exo.compute.precision == rollout.compute.precision
    assert exo.reference is None and exo.model == rollout.model
    assert exo.candidates == rollout.sampling.candidates
    assert rollout.sampling.max_new_tokens <= exo.data.max_completion_tokens == LONGEST_COMPLETION + 1
    # Data parallelism in one stage and tensor parallelism in another.
    assert (sft.parallel.tensor, exo.parallel.tensor) == (1, 2)
    assert stages["evaluate"].upstream == ("sft", "align_exo", "align_dpo")
    assert stages["hf"].config.output == Path("somewhere/hf")


def policy(reward: float, kl: float, *, seed: int, noise: float = 0.5) -> PromptMeans:
    """What a policy gets at 320 prompts, around these means."""
    values = np.random.default_rng(seed).normal(size=(2, 320))
    rewards, kls = noise * (values - values.mean(axis=1, keepdims=True))
    return PromptMeans(reward + rewards, kl + 0.1 * kls)


Points = list[tuple[float, float]]


def make_means(exo: Points, dpo: Points) -> dict[str, dict[int | None, PromptMeans]]:
    """Checkpoints every 24 steps with these rewards and KLs, and SFT at reward 0."""
    by_name = {
        name: {24 * (i + 1): policy(*each, seed=10 * i + place) for i, each in enumerate(points)}
        for place, (name, points) in enumerate((("exo", exo), ("dpo", dpo)))
    }
    return {"reference": {474: policy(0.0, 0.0, seed=99)}, **by_name}


def test_description_has_a_line_per_policy() -> None:
    lines = describe(SUMMARY).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["sft", "0.100", "±", "0.030", "0.000", "±", "0.000"],
        ["exo", "0.600", "±", "0.040", "1.250", "±", "0.050"],
        ["dpo", "-0.100", "±", "0.040", "1.000", "±", "0.030"],
    ]


@pytest.mark.parametrize(
    ("dpo", "verdict"),
    [
        ([(0.0, 0.2), (0.2, 0.8)], "EXO's reward is higher"),
        ([(0.6, 0.2), (1.2, 0.8)], "DPO's reward is higher"),
        ([(0.4, 0.2), (0.77, 0.8)], "no difference can be told"),
        ([(0.4, 0.2), (0.6, 0.8), (0.65, 0.8)], "EXO's reward is higher"),
    ],
)
def test_verdict_at_equal_kl_is_that_of_the_interval(dpo: Points, verdict: str) -> None:
    """EXO goes 0.4 to 1.0 between KL 0.3 and 1.2: 0.78 at DPO's 0.8."""
    means = make_means([(0.4, 0.3), (1.0, 1.2)], dpo)
    gains, steps, equal_kl, *_ = compare(means)
    assert verdict in equal_kl and equal_kl.startswith("At equal KL (0.80")
    assert gains.startswith("Gain of reward over SFT: EXO +1.00") and "At equal steps (" in steps


def test_the_sign_is_exos_whichever_goes_farther() -> None:
    means = make_means([(0.0, 0.2), (0.2, 0.8)], [(0.4, 0.3), (1.0, 1.2)])
    assert "DPO's reward is higher: EXO minus DPO -0.5" in compare(means)[2]
    assert "0.80 nats, EXO's last" in compare(means)[2]


def test_no_verdict_where_one_method_is_beyond_all_of_the_other() -> None:
    means = make_means([(1.0, 2.0), (2.0, 3.0)], [(0.1, 0.2), (0.5, 1.0)])
    assert "nothing to say" in compare(means)[2]
