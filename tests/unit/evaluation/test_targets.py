"""The temperature of an evaluation against those of the trainings that made the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from exo_megatron.checkpoint.directory import STEPS_DIRECTORY, step_directory
from exo_megatron.config.document import dump_config
from exo_megatron.config.stages import CONFIG_FILE, AlignConfig, SftConfig, StageConfig
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.evaluation.targets import Plan, Target, describe_disagreement, training_temperature
from exo_megatron.execution.policy import PolicyCheckpoint
from exo_megatron.models.spec import ModelSpec

BASE: dict[str, Any] = {"output": "o", "model": {"checkpoint": "c"}, "data": {"path": "d"}}


def aligned(temperature: float) -> AlignConfig:
    return AlignConfig.model_validate({**BASE, "loss": {"temperature": temperature}})


def trained(output: Path, config: StageConfig, step: int = 8) -> Path:
    """A checkpoint of a training output with this configuration; its files do not matter here."""
    checkpoint = step_directory(output / STEPS_DIRECTORY, step)
    checkpoint.mkdir(parents=True)
    dump_config(config, output / CONFIG_FILE)
    return checkpoint


def plan(reference: Path, **models: Path) -> Plan:
    targets = [
        Target(name, 8, PolicyCheckpoint(path, "f", cast("ModelSpec", None)))
        for name, path in {"reference": reference, **models}.items()
    ]
    return Plan(targets[0], tuple(targets[1:]), cast("Tokenizer", None), (), "")


def test_the_temperature_of_a_training(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "exo", aligned(0.7))
    assert training_temperature(checkpoint) == 0.7
    (tmp_path / "latest").symlink_to(checkpoint)
    assert training_temperature(tmp_path / "latest") == 0.7


def test_where_none_is_known_none_is_told(tmp_path: Path) -> None:
    """Of SFT, of a converted model, of a checkpoint that was copied, and beside a file of another program."""
    assert training_temperature(trained(tmp_path / "sft", SftConfig.model_validate(BASE))) is None
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    assert training_temperature(base) is None
    dump_config(aligned(0.7), tmp_path / CONFIG_FILE)
    assert training_temperature(base) is None, "the configuration of something else"
    checkpoint = trained(tmp_path / "exo", aligned(0.7))
    for text in ("loss: [", "loss: 3\n", "loss: {temperature: high}\n", "other: !!python/name:os.system\n", ""):
        (tmp_path / "exo" / CONFIG_FILE).write_text(text)
        assert training_temperature(checkpoint) is None
    (tmp_path / "exo" / CONFIG_FILE).unlink()
    assert training_temperature(checkpoint) is None


@pytest.fixture
def models(tmp_path: Path) -> Plan:
    sft = trained(tmp_path / "sft", SftConfig.model_validate(BASE))
    exo, dpo = (trained(tmp_path / name, aligned(0.8)) for name in ("exo", "dpo"))
    return plan(sft, exo=exo, again=trained(tmp_path / "exo", aligned(0.8), step=16), dpo=dpo)


def test_equal_temperatures_need_no_line(models: Plan) -> None:
    assert describe_disagreement(models, 0.8) is None


def test_another_temperature_is_told_with_the_models_and_the_remedy(models: Plan, tmp_path: Path) -> None:
    line = describe_disagreement(models, 1.0)
    assert line == (
        "sampling.temperature is 1.0, but loss.temperature was 0.8 in the training of exo, 0.8 in the training of "
        "again, 0.8 in the training of dpo: reward and KL are those of other distributions than the loss compared; to "
        "make them agree, set sampling.temperature=0.8"
    )
    cold = trained(tmp_path / "cold", aligned(0.5))
    line = describe_disagreement(plan(cold, exo=models.targets[0].source.path), 0.8)
    assert line is not None and "loss.temperature was 0.5 in the training of reference:" in line
    assert line.endswith("set sampling.temperature=0.5")
    line = describe_disagreement(plan(cold, exo=models.targets[0].source.path), 1.0)
    assert line is not None and line.endswith("set sampling.temperature to that of the training")
