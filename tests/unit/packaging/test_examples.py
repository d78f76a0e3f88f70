"""The example configurations load, what one stage writes the next one reads, and run.yaml says the same in one file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from exo_megatron.config.load import load_run_config, load_stage_config
from exo_megatron.config.stages import STAGE_CONFIGS
from exo_megatron.rewards.function import load_reward_function
from exo_megatron.rewards.records import score_share
from tests.reference.candidates import read_scorable

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "examples" / "configs"
ORDER = ("import", "sft", "rollout", "score", "align", "evaluate", "export")
CHAIN = {
    "import": (),
    "sft": ("import",),
    "rollout": ("sft",),
    "score": ("rollout",),
    "align": ("sft", "score"),
    "evaluate": ("sft", "align"),
    "export": ("align",),
}
"""Stage -> the stages whose output it reads."""


def stage_of(file: Path) -> str:
    """align_6b.yaml -> align"""
    return file.stem.partition("_")[0]


FILES = {stage_of(file): file for file in sorted(CONFIGS.glob("*.yaml"))}


def test_there_is_one_file_per_stage_and_nothing_else() -> None:
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(file.name for file in FILES.values())
    assert set(FILES) == {*STAGE_CONFIGS, "run"}


@pytest.mark.parametrize("stage", ORDER)
def test_it_loads_as_the_stage_of_its_name(stage: str) -> None:
    assert isinstance(load_stage_config(stage, FILES[stage], []), STAGE_CONFIGS[stage])


@pytest.mark.parametrize("file", FILES.values(), ids=lambda file: file.name)
def test_the_head_starts_this_very_file(file: Path) -> None:
    head = file.read_text(encoding="utf-8").partition("\n\n")[0]
    assert re.search(rf"exo.megatron {stage_of(file)} --config examples/configs/{re.escape(file.name)}\b", head)


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The single files as stages of a run, which checks what they must agree on and who reads whose output."""
    stages = [
        {"name": stage, "stage": stage, "config": yaml.safe_load(FILES[stage].read_text(encoding="utf-8"))}
        for stage in ORDER
    ]
    file = tmp_path_factory.mktemp("run") / "joined.yaml"
    file.write_text(yaml.safe_dump({"output": "joined", "stages": stages}), encoding="utf-8")
    return load_run_config(file, [])


def test_what_one_stage_writes_the_next_one_reads(one_after_the_other: Any) -> None:
    assert {stage.name: stage.upstream for stage in one_after_the_other.stages} == CHAIN


def without_outputs(run: Any) -> dict[str, object]:
    """Stage -> its settings, with `${STAGE}` for the output of an earlier stage and without its own."""
    settings: dict[str, object] = {}
    outputs = {str(stage.config.output): stage.stage for stage in run.stages}
    for stage in run.stages:
        text = json.dumps(stage.config.model_dump(mode="json", exclude={"output"}))
        for output, name in outputs.items():
            text = text.replace(f'"{output}"', f'"${{{name}}}"')
        settings[stage.stage] = json.loads(text)
    return settings


def test_run_yaml_is_the_single_files_in_one(one_after_the_other: Any) -> None:
    run = load_run_config(FILES["run"], [])
    assert [stage.stage for stage in run.stages] == list(ORDER)
    assert without_outputs(run) == without_outputs(one_after_the_other)


def test_run_yaml_writes_where_no_single_file_does(one_after_the_other: Any) -> None:
    """Or a run would put their outputs aside, and they would overwrite those of a run."""
    run = load_run_config(FILES["run"], [])
    singles = {stage.config.output for stage in one_after_the_other.stages}
    assert not singles & {stage.config.output for stage in run.stages}


@pytest.mark.parametrize("file", [file for stage, file in FILES.items() if stage != "run"], ids=lambda file: file.name)
def test_variables_of_the_job_script_stand_at_the_keys_that_they_set(file: Path) -> None:
    """`key: value  # exo_6b.sh: NAME` is what slurm/exo_6b.sh does with NAME for this stage."""
    script = (ROOT / "slurm" / "exo_6b.sh").read_text(encoding="utf-8")
    chosen = re.search(
        rf"^ *(?:\w+ \| )*{stage_of(file)}(?: \| \w+)*\) MODEL_KEY=(\S+) DATA_KEY=(\S+)", script, re.MULTILINE
    )
    assert chosen is not None
    keys = {"OUTPUT": "output", "MODEL": chosen[1], "DATA": chosen[2], "TP": "tensor", "PP": "pipeline"}
    found: dict[str, str] = {}
    section = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if (part := re.match(r"(\w+):", line)) is not None:
            section = part[1]
        if (named := re.match(r"( *)(\w+):.*# exo_6b\.sh: (\w+)", line)) is not None:
            inner = named[1] and named[3] not in ("TP", "PP")
            found[named[3]] = f"{section}.{named[2]}" if inner else named[2]
    assert found == {name: key for name, key in keys.items() if name in found}
    wanted = {name for name in ("OUTPUT", "MODEL", "DATA") if keys[name] != "''"}
    assert wanted <= set(found)


def test_the_ground_truth_reward_judges_the_records_of_its_document(tmp_path: Path) -> None:
    """The record of examples/README.md, as `score` reads it, by the function that the document names."""
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").split("## Ground truth")[1]
    (record,) = re.findall(r"```json\n(.*?)```", readme, re.DOTALL)[:1]
    (name,) = re.findall(r"reward\.function=(\S+)", readme)[:1]
    right = {**json.loads(record), "completions": ["5 and 17 are 22.0.", "22, or rather 21", "no idea"]}
    wrong = {"prompt": "What is 3 - 5?", "answer": -2, "completions": ["2", "3 - 5 = -2"]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(right) + "\n" + json.dumps(wrong) + "\n")
    records = read_scorable(tmp_path / "mine.jsonl")
    scored = score_share(records, load_reward_function(name), names=["answer"], batch_size=2)
    assert [record.rewards for record in scored] == [(1.0, 0.0, 0.0), (0.0, 1.0)]
