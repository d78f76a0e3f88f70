"""The same question put through the project's own stages, with all parameters of a tiny Llama trained.

    python -m frontier.stages --output DIR     writes DIR/workflow.yaml for `exo-megatron run`

The inputs in DIR/inputs are the quickstart's. One rollout of the largest K serves every run: a smaller K takes the
first candidates.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from quickstart.prepare import LONGEST_COMPLETION

from exo_megatron.config.load import load_run_config
from exo_megatron.config.stages import AlignConfig, EvaluateConfig
from exo_megatron.evaluation.estimates import REFERENCE_NAME, PromptMeans
from exo_megatron.evaluation.prompt_means import read_prompt_means
from exo_megatron.utils.files import write_text
from frontier.sweep import METHODS, Run

POLICY = "transformer"
K = (8, 32)
BETAS = (2.0, 0.5)
RATES = (2e-4, 4e-4)
BETA_PI = 0.5
PROMPTS = 1536
TEST_SAMPLES = 8
"""Texts at each test prompt."""

LONGEST = LONGEST_COMPLETION + 1
"""Tokens of a completion, with its end, of the quickstart's texts."""


def make_workflow(output: Path) -> dict[str, Any]:
    """The `run` file: SFT, one rollout, a run of `align` for every setting, one evaluation of them all."""
    aligned = {
        f"{method}-K{k}-beta{beta:g}-lr{rate:g}": {
            "model": {"checkpoint": "${sft}"},
            "data": {"path": "${score}"},
            "candidates": k,
            "loss": {"kind": method, "beta_pi": BETA_PI, "beta_r": beta},
            "optimizer": {"lr": rate, "warmup_steps": 5},
            "batch": {"groups": 16},
        }
        for k, beta, rate, method in product(K, BETAS, RATES, METHODS)
    }
    stages = [
        ("import", "import", {"hf": "${output}/inputs/hf"}),
        ("sft", "sft", _sft()),
        (
            "rollout",
            "rollout",
            {
                "model": {"checkpoint": "${sft}"},
                "data": {"path": "${output}/inputs/train_prompts.jsonl", "limit": PROMPTS},
                "sampling": {"candidates": max(K)},
            },
        ),
        ("score", "score", {"candidates": "${rollout}"}),
        *((name, "align", config) for name, config in aligned.items()),
        (
            "evaluate",
            "evaluate",
            {
                "models": {name: f"${{{name}}}" for name in aligned},
                "reference": {"checkpoint": "${sft}"},
                "data": {"path": "${output}/inputs/test_prompts.jsonl"},
                "sampling": {"candidates": TEST_SAMPLES},
            },
        ),
    ]
    return {
        "output": str(output),
        "defaults": {
            "compute": {"precision": "fp32", "max_tokens_per_microbatch": 4096},
            "data": {"max_prompt_tokens": 64, "max_completion_tokens": LONGEST},
            "sampling": {"temperature": 0.8, "max_new_tokens": LONGEST, "max_active_candidates": 512},
            "reward": {"kind": "function", "function": "frontier.reward:score", "batch_size": 256},
        },
        "stages": [{"name": name, "stage": stage, "config": config} for name, stage, config in stages],
    }


def _sft() -> dict[str, Any]:
    return {
        "model": {"checkpoint": "${import}"},
        "data": {"path": "${output}/inputs/sft.jsonl"},
        "optimizer": {"lr": 3e-3, "warmup_steps": 20},
        "batch": {"groups": 32, "epochs": 3},
        "log": {"interval": 10},
    }


def read_stage_runs(output: Path) -> tuple[dict[Run, PromptMeans], PromptMeans]:
    """End points of all runs, and the reference's, from the finished workflow in `output`."""
    stages = {stage.name: stage.config for stage in load_run_config(output / "workflow.yaml", []).stages}
    evaluate = stages["evaluate"]
    assert isinstance(evaluate, EvaluateConfig)
    means = read_prompt_means(evaluate.output / "prompts.jsonl")
    last = {name: by_step[max(by_step, key=lambda step: step or 0)] for name, by_step in means.items()}
    runs = {_run(stages[name]): last[name] for name in evaluate.models}
    return runs, last[REFERENCE_NAME]


def _run(config: object) -> Run:
    assert isinstance(config, AlignConfig)
    return Run(
        policy=POLICY,
        rank=None,
        K=config.candidates or 0,
        method=config.loss.kind,
        beta_pi=config.loss.beta_pi,
        beta_r=config.loss.beta_r,
        lr=config.optimizer.lr,
        steps=PROMPTS // config.batch.groups,
        groups=config.batch.groups,
        seed=config.seed,
    )


def main() -> None:
    """Write the workflow."""
    parser = argparse.ArgumentParser(description="workflow of the stages")
    parser.add_argument("--output", type=Path, required=True)
    output: Path = parser.parse_args().output
    write_text(output / "workflow.yaml", yaml.safe_dump(make_workflow(output), sort_keys=False))


if __name__ == "__main__":
    main()
