"""A run: defaults, substitution, outputs, seeds, who reads whom, and digests that follow the inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from exo_megatron.config.document import config_digest
from exo_megatron.config.load import load_run_config
from exo_megatron.config.sections import CandidatesDataConfig
from exo_megatron.config.stages import AlignConfig, ExportConfig, RolloutConfig, SftConfig
from exo_megatron.config.workflow import Workflow
from exo_megatron.errors import ConfigError

RUN = """\
output: out
seed: 7
defaults:
  compute: {precision: fp32, max_tokens_per_microbatch: 512}
  parallel: {tensor: 2}
  optimizer:
    weight_decay: 0.1
stages:
  - name: base
    stage: import
    config: {hf: /models/x}
  - name: sft
    stage: sft
    config:
      seed: 1
      model: {checkpoint: "${base}"}
      data: {path: d.jsonl}
      compute: {max_tokens_per_microbatch: 1024}
  - name: candidates
    stage: rollout
    config:
      model: {checkpoint: "${sft}/checkpoints"}
      data: {path: p.jsonl}
  - name: exo-1.5
    stage: align
    config:
      model: {checkpoint: "${sft}"}
      data: {path: "${candidates}"}
      optimizer: {lr: 1e-7}
  - name: hf
    stage: export
    config:
      output: "${output}/hf-model"
      model: {checkpoint: "${exo-1.5}"}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


def error_of(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(file, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def configs(workflow: Workflow):
    return {each.name: each.config for each in workflow.stages}


def digests(workflow: Workflow) -> dict[str, str]:
    return {each.name: each.digest for each in workflow.stages}


def test_defaults_outputs_seeds_and_substitution(file):
    found = configs(load_run_config(file, []))
    sft, rollout, align, export = found["sft"], found["candidates"], found["exo-1.5"], found["hf"]
    assert isinstance(sft, SftConfig)
    assert isinstance(rollout, RolloutConfig)
    assert isinstance(align, AlignConfig)
    assert isinstance(export, ExportConfig)
    assert (sft.compute.precision, sft.compute.max_tokens_per_microbatch, sft.parallel.tensor) == ("fp32", 1024, 2)
    assert rollout.compute.max_tokens_per_microbatch == 512
    assert (sft.seed, rollout.seed) == (1, 7)
    assert (sft.optimizer.weight_decay, sft.optimizer.lr) == (0.1, 1e-5)
    assert (align.optimizer.weight_decay, align.optimizer.lr) == (0.1, 1e-7)
    assert (sft.output, export.output) == (Path("out/sft"), Path("out/hf-model"))
    assert sft.model.checkpoint == Path("out/base")
    assert align.data.path == "out/candidates"
    assert export.model.checkpoint == Path("out/exo-1.5")


def test_the_data_of_score_take_no_defaults(file):
    """Those name columns and limits of data that the models read; what `score` reads is the output of a rollout."""
    stage = '  - {name: s, stage: score, config: {candidates: "${candidates}", reward: {function: "m:f"}}}\n'
    data = "  data: {max_prompt_tokens: 9, columns: {prompt: q}, on_invalid: skip}\n"
    file.write_text(RUN.replace("defaults:\n", f"defaults:\n{data}") + stage, encoding="utf-8")
    found = configs(load_run_config(file, ["stages.s.data.columns.completions=a"]))
    assert found["s"].data == CandidatesDataConfig(columns={"completions": "a"})
    assert found["candidates"].data.columns == {"prompt": "q"}


def test_overrides(file):
    found = configs(
        load_run_config(
            file, ["output=/else", "defaults.compute.precision=bf16", "stages.exo-1.5.optimizer.lr=3e-6", "seed=9"]
        )
    )
    assert found["candidates"].compute.precision == "bf16"
    assert found["exo-1.5"].optimizer.lr == 3e-6
    assert found["exo-1.5"].data.path == "/else/candidates"
    assert found["hf"].seed == 9


def test_longest_stage_name_is_meant(tmp_path):
    file = tmp_path / "r.yaml"
    text = "output: o\nstages:\n"
    for name in ("a", "a.seed"):
        text += f"  - {{name: {name}, stage: import, config: {{hf: x}}}}\n"
    file.write_text(text, encoding="utf-8")
    found = configs(load_run_config(file, ["stages.a.seed=3", "stages.a.seed.seed=4"]))
    assert (found["a"].seed, found["a.seed"].seed) == (3, 4)


def test_who_reads_whom(file):
    workflow = load_run_config(file, [])
    upstream = {each.name: each.upstream for each in workflow.stages}
    assert upstream == {
        "base": (),
        "sft": ("base",),
        "candidates": ("sft",),
        "exo-1.5": ("sft", "candidates"),
        "hf": ("exo-1.5",),
    }
    assert [each.name for each in workflow.downstream("candidates")] == ["exo-1.5", "hf"]
    assert [each.name for each in workflow.downstream("hf")] == []


def test_digests_follow_the_inputs(file):
    before = digests(load_run_config(file, []))
    base = load_run_config(file, []).stages[0]
    assert base.digest == config_digest(base.config)

    def changed(*overrides: str) -> list[str]:
        after = digests(load_run_config(file, overrides))
        return [name for name in before if before[name] != after[name]]

    assert changed() == []
    assert changed("stages.hf.dtype=fp32") == ["hf"]
    assert changed("stages.candidates.sampling.candidates=8") == ["candidates", "exo-1.5", "hf"]
    assert changed("stages.base.seed=1") == ["base", "sft", "candidates", "exo-1.5", "hf"]
    assert changed("defaults.optimizer.weight_decay=0") == ["sft", "candidates", "exo-1.5", "hf"]


def test_rendered_run_loads_as_equal(file, tmp_path):
    workflow = load_run_config(file, ["output='1e-6'"])
    (tmp_path / "resolved.yaml").write_text(workflow.render(), encoding="utf-8")
    assert load_run_config(tmp_path / "resolved.yaml", []) == workflow


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.sf.seed=3", ["no stage is called 'sf'", "write stages.sft.KEY=value"]),
        ("stages.sft=3", ["stages.NAME.KEY=value"]),
        (
            "stages.sft.optimiser.lr=3",
            ["command line: stages.sft.optimiser: unknown key", "write stages.sft.optimizer"],
        ),
        ("stages.sft.optimizer.lr=-3", ["command line: stages.sft.optimizer.lr: got -3"]),
        ("stages.sft.optimizer.lr.x=-3", ["stages.sft.optimizer.lr: got {'x': -3}"]),
        ("stages.candidates.model=null", ["stages.candidates.model: got null", "section (checkpoint)"]),
        (
            "stages.candidates.model={}",
            ["stages.candidates.model.checkpoint: missing", "pass stages.candid"],
        ),
        ("defaults.compte.precision=fp32", ["defaults.compte: no stage has a section", "write compute"]),
        ("defaults.seed=3", ["defaults.seed: no stage has a section"]),
        (
            "defaults.compute.precisio=fp32",
            ["defaults.compute.precisio: unknown key", "write defaults.compute.precision"],
        ),
        ("defaults.sampling.temperature=-1", ["defaults.sampling.temperature: got -1"]),
        ("defaults.loss.kind=nope", ["defaults.loss.kind: got 'nope'"]),
        ("defaults.loss.kind=sigmoid", ["defaults.loss.kind: got 'sigmoid'", "fix: write dpo_pref"]),
        ("defaults.loss.beta=1", ["unknown key 'beta'", "fix: write defaults.loss.beta_pi"]),
        ("stages.exo-1.5.beta=1", ["unknown key 'beta'", "fix: write stages.exo-1.5.loss.beta_pi"]),
        ("defaults.compute=null", ["defaults.compute: got null"]),
        ("stages.exo-1.5.model.checkpoint='${stf}'", ["${stf} is unknown", "write ${sft}"]),
        ("stages.sft.model.checkpoint='${candidates}'", ["${candidates} is not an earlier stage"]),
        ("stages.sft.model.checkpoint='${sft}'", ["${sft} is not an earlier stage"]),
        ("stages.hf.output='${sft}'", ["which is or holds the output of stage sft"]),
        ("stages.hf.output=out/x/..", ["which is or holds the output of the run"]),
        ("stages=[]", ["stages: got []", "non-empty list"]),
        ("stages=3", ["stages: got 3"]),
        ("stages=[{name: a b, stage: sft}]", ["stages.0.name: got 'a b'"]),
        ("stages=[{name: a, stage: sfft}]", ["stages.0.stage: got 'sfft'", "write sft"]),
        ("stages=[{name: output, stage: import}]", ["'output' is reserved"]),
        ("stages=[{name: .., stage: import}]", ["'..' is reserved"]),
        ("outptu=3", ["outptu: unknown key", "write output"]),
    ],
)
def test_mistakes(file, override, words):
    text = error_of(file, override)
    assert all(word in text for word in words), text


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(RUN.splitlines(), start=1) if text in line)


def test_mistakes_name_the_line(file):
    file.write_text(RUN.replace("lr: 1e-7", "lr: -1"), encoding="utf-8")
    assert error_of(file).startswith(f"{file}:{line_of('lr: 1e-7')}: stages.exo-1.5.optimizer.lr: got -1")
    file.write_text(RUN.replace("weight_decay: 0.1", "weight_dcay: 0.1"), encoding="utf-8")
    assert error_of(file).startswith(f"{file}:{line_of('weight_decay')}: defaults.optimizer.weight_dcay: unknown key")
    file.write_text(RUN.replace("name: candidates", "name: sft"), encoding="utf-8")
    assert f"{file}:{line_of('name: candidates')}: stages.2.name: the name 'sft' is taken" in error_of(file)


DISAGREEMENTS = [
    (
        "stages.candidates.sampling.temperature=1",
        "loss.temperature: got 0.8, but the rollout stores log-probs at sampling.temperature 1.0; expected 1.0",
    ),
    ("stages.exo-1.5.loss.temperature=0.5", "loss.temperature: got 0.5, but the rollout stores log-probs at"),
    ("stages.candidates.compute.precision=bf16", "precision: got fp32, but the rollout stores log-probs of bf16"),
    (
        "stages.exo-1.5.reference.checkpoint='${base}'",
        "reference.checkpoint: got out/base, but the rollout stores log-probs of out/sft/checkpoints",
    ),
    ("stages.exo-1.5.model.checkpoint='${base}'", "model.checkpoint: got out/base, but the rollout stores"),
]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize(("override", "words"), DISAGREEMENTS)
def test_what_align_would_refuse_after_the_rollout_is_told_before(file, override, words, scored):
    """Whether `align` reads the rollout itself or what `score` made of it."""
    if scored:
        score = """  - name: scored
    stage: score
    config: {candidates: "${candidates}", reward: {function: "m:f"}}
  - name: exo-1.5"""
        changed = RUN.replace("  - name: exo-1.5", score).replace(
            'data: {path: "${candidates}"}', 'data: {path: "${scored}"}'
        )
        file.write_text(changed, encoding="utf-8")
    load_run_config(file, [])
    error = error_of(file, override)
    assert words in error and error.endswith("or set reference_logprobs to computed"), error
    for way in ("computed", "live"):
        load_run_config(file, [override, f"stages.exo-1.5.reference_logprobs={way}"])


def test_only_stages_that_belong_together_must_agree(file):
    """Data from elsewhere are judged when they are read; so is a reference that no stage of the run makes."""
    load_run_config(file, ["stages.exo-1.5.data.path=other/candidates.jsonl", "stages.exo-1.5.loss.temperature=0.5"])
    load_run_config(file, ["stages.exo-1.5.reference.checkpoint=other/sft"])


def test_processes_wait_in_all_stages_as_the_run_says_and_its_digests_do_not_know(file):
    plain, patient = load_run_config(file, []), load_run_config(file, ["runtime.timeout_seconds=7"])
    assert patient.runtime.timeout_seconds == 7
    assert {stage.config.runtime.timeout_seconds for stage in patient.stages} == {7}
    assert [stage.digest for stage in patient.stages] == [stage.digest for stage in plain.stages]
    file.write_text(patient.render(), encoding="utf-8")
    assert load_run_config(file, []) == patient


@pytest.mark.parametrize("override", ["stages.sft.runtime.timeout_seconds=7", "defaults.runtime.timeout_seconds=7"])
def test_a_stage_of_a_run_does_not_wait_otherwise(file, override):
    with pytest.raises(ConfigError, match="differs from `runtime` of the run"):
        load_run_config(file, [override])
