"""The quickstart's pipeline, script and closing words, without running a model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from quickstart.finish import describe, gain
from quickstart.prepare import LONGEST_COMPLETION

from exo_megatron.config.load import load_run_config
from exo_megatron.config.stages import AlignConfig, EvaluateConfig, RolloutConfig, SftConfig

DIRECTORY = Path(__file__).parents[3] / "examples" / "quickstart"
SUMMARY = {
    "sft": {"reward": 0.1, "reward_stderr": 0.03, "kl": 0.0, "prompts": 320},
    "exo": {"reward": 0.6, "reward_stderr": 0.04, "kl": 1.25, "prompts": 320},
    "dpo": {"reward": -0.1, "reward_stderr": 0.04, "kl": 1.0, "prompts": 320},
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


def test_gain_in_standard_errors_by_hand() -> None:
    assert gain(SUMMARY["exo"], SUMMARY["sft"]) == "+0.50 (10 standard errors)"
    assert gain(SUMMARY["dpo"], SUMMARY["sft"]) == "-0.20 (-4 standard errors)"


def test_description_has_a_line_per_policy() -> None:
    lines = describe(SUMMARY).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["sft", "0.100", "±", "0.030", "0.000"],
        ["exo", "0.600", "±", "0.040", "1.250"],
        ["dpo", "-0.100", "±", "0.040", "1.000"],
    ]
    assert lines[-1].startswith("Over SFT, on 320 unseen prompts: EXO +0.50")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "--data    real labelled texts"),
        (["--dat", "x"], 2, "unknown argument --dat"),
        (["--output"], 2, "--output needs a value"),
        (["--data", "/no/such/file"], 2, "--data /no/such/file: no such file"),
    ],
)
def test_script_explains_itself(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    """Before anything is installed or written."""
    done = subprocess.run(
        ["bash", str(DIRECTORY / "run.sh"), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
