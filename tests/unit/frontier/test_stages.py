"""The workflow of stages is valid, and its end points are read back with their settings."""

from __future__ import annotations

from pathlib import Path

import yaml
from frontier.reward import score
from frontier.stages import BETAS, RATES, K, make_workflow, read_stage_runs
from frontier.sweep import METHODS
from quickstart.oracle import Oracle

from exo_megatron.config.load import load_run_config
from exo_megatron.config.stages import AlignConfig, RolloutConfig
from exo_megatron.utils.files import write_jsonl


def test_workflow(tmp_path: Path) -> None:
    (tmp_path / "workflow.yaml").write_text(yaml.safe_dump(make_workflow(tmp_path)))
    stages = {stage.name: stage.config for stage in load_run_config(tmp_path / "workflow.yaml", []).stages}
    rollout = stages["rollout"]
    assert isinstance(rollout, RolloutConfig)
    aligned = {name: config for name, config in stages.items() if isinstance(config, AlignConfig)}
    assert len(aligned) == len(K) * len(BETAS) * len(RATES) * len(METHODS)
    for config in aligned.values():
        assert config.loss.temperature == rollout.sampling.temperature
        assert (config.candidates or 0) <= rollout.sampling.candidates
    lines = [
        {"name": name, "step": step, "rewards": [i + step, 1.0], "kls": [0.5, 1.5]}
        for i, name in enumerate(aligned)
        for step in (16, 32)
    ]
    reference = {"name": "reference", "step": None, "rewards": [0.0, 1.0], "kls": [0.0, 0.0]}
    (tmp_path / "evaluate").mkdir()
    write_jsonl(tmp_path / "evaluate" / "prompts.jsonl", [*lines, reference])
    runs, start = read_stage_runs(tmp_path)
    assert start.rewards.tolist() == [0.0, 1.0]
    assert {(run.K, run.beta_r, run.lr, run.method) for run in runs} == {
        (k, beta, rate, method) for k in K for beta in BETAS for rate in RATES for method in METHODS
    }
    assert sorted(means.rewards[0] for means in runs.values()) == [32.0 + i for i in range(len(aligned))]


def test_reward_function_has_two_modes(tmp_path: Path, monkeypatch) -> None:
    Oracle({"good": 2.0, "bad": -3.0}, 0.5).save(tmp_path / "oracle.json")
    monkeypatch.setenv("QUICKSTART_ORACLE", str(tmp_path / "oracle.json"))
    assert score(["so", "so"], [" good", " bad"]) == [5.0, 5.0]
