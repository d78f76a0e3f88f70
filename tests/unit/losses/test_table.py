"""The table of losses: what has no row cannot train, and everything that names kinds reads the table."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exo_megatron.config.describe import describe_keys
from exo_megatron.config.losses import COMMON_KEYS, FUNCTION, FUNCTION_KEYS, LOSSES, LossRow, kinds_comparing
from exo_megatron.config.sections import LossConfig
from exo_megatron.config.stages import AlignConfig
from exo_megatron.errors import ConfigError
from exo_megatron.losses.objective import BUILT_IN, LossInputs, find_loss, group_objective, join_table, loss_row

ROOT = Path(__file__).parents[3]
ROW = LossRow("Eq. 0", "rewards", ("beta_pi",))


def zero(inputs: LossInputs) -> Tensor:
    return inputs.log_ratio.sum(dim=-1) * 0


def test_a_kind_without_a_row_or_without_a_function_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"without a row .*\['b'\]"):
        join_table({"a": ROW}, {"a": zero, "b": zero})
    with pytest.raises(RuntimeError, match=r"without a function: \['a'\]"):
        join_table({"a": ROW}, {})
    assert BUILT_IN.keys() == LOSSES.keys()


def add_row(package: Path) -> None:
    table = package / "config" / "losses.py"
    text = table.read_text()
    assert text.count("LOSSES = {\n") == 1
    row = '    "new_rw": LossRow("Eq. 0", "rewards", ("beta_pi",)),\n'
    table.write_text(text.replace("LOSSES = {\n", "LOSSES = {\n" + row))


def add_function(package: Path) -> None:
    table = package / "losses" / "objective.py"
    text = table.read_text()
    line = '    "exo_rw": lambda inputs: '
    assert text.count(line) == 1
    table.write_text(text.replace(line, '    "new_rw": lambda inputs: inputs.log_p_theta[:, 0],\n' + line))


@pytest.mark.parametrize("add", [add_row, add_function])
def test_half_a_kind_cannot_train(add: Callable[[Path], None], tmp_path: Path) -> None:
    """With only its row, the schema accepts the kind, and with only its function nobody can ask for it: import fails.

    Before there was a table, such a kind trained EXO.
    """
    shutil.copytree(ROOT / "exo_megatron", tmp_path / "exo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    add(tmp_path / "exo_megatron")
    code = "import exo_megatron.training.objectives"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "kinds of loss without a row in config/losses.py or without a function: ['new_rw']" in done.stderr


def test_a_kind_that_is_not_in_the_table_is_refused_by_the_schema_and_by_the_objective() -> None:
    with pytest.raises(ValueError, match="kind"):
        LossConfig(kind="kto")
    logps = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(KeyError):
        group_objective(logps, logps, logps, [2], LossConfig.model_construct(kind="kto"))


def test_keys_of_the_table_are_keys_of_the_configuration() -> None:
    known = set(LossConfig.model_fields)
    named = {key for row in LOSSES.values() for key in row.keys}
    assert named | set(COMMON_KEYS) | set(FUNCTION_KEYS) == known
    assert FUNCTION not in LOSSES


def test_help_and_documents_name_every_kind() -> None:
    (kind,) = [each for each in describe_keys(AlignConfig) if each.key == "loss.kind"]
    assert kind.accepts.removeprefix("one of ").split(", ") == [*LOSSES, FUNCTION]
    for name, row in LOSSES.items():
        assert f"{name}: {row.equation}" in kind.meaning
    assert kinds_comparing("rewards") == "exo_rw or dpo_rw"
    table = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| (\S.*?) \| (rewards|preference) \| (.*?) \|", table, re.MULTILINE)
    assert [(name, equation, compares, keys) for name, equation, compares, keys in documented] == [
        (name, row.equation, row.compares, ", ".join(f"`{key}`" for key in row.keys)) for name, row in LOSSES.items()
    ]


@loss_row(compares="preference", log_weights=True)
def weighted(inputs: LossInputs) -> Tensor:
    assert inputs.log_weights is not None
    return (inputs.log_weights.exp() * inputs.log_ratio).sum(dim=-1)


def plain(inputs: LossInputs) -> Tensor:
    assert inputs.rewards is not None
    return torch.where(inputs.mask, inputs.rewards * inputs.log_ratio, 0.0).sum(dim=-1)


def scalar(inputs: LossInputs) -> Tensor:
    return inputs.log_ratio.sum()


def test_a_function_of_the_users_brings_its_row() -> None:
    name = __name__
    logps = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    rewards = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    config = LossConfig(function=f"{name}:plain")
    assert config.kind == FUNCTION
    assert find_loss(config).row.compares == "rewards"
    found = group_objective(logps, torch.zeros_like(logps), rewards, [1, 2], config)
    assert found.losses.tolist() == [1.0, 4.0]

    config = LossConfig(function=f"{name}:weighted")
    weights = torch.tensor([0.5, 0.25], dtype=torch.float64)
    found = group_objective(logps[:2], torch.zeros(2).double(), None, [2], config, log_weights=weights.log())
    assert found.losses.tolist() == pytest.approx([1.0])
    with pytest.raises(ValueError, match="needs log-weights"):
        group_objective(logps[:2], torch.zeros(2).double(), None, [2], config)


def test_mistakes_in_a_function_of_the_users_are_told() -> None:
    logps = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"loss.function .*:scalar: returned shape \[\] for 1 groups"):
        group_objective(logps, logps, logps, [2], LossConfig(function=f"{__name__}:scalar"))
    with pytest.raises(ConfigError, match="has no function 'absent'"):
        find_loss(LossConfig(function=f"{__name__}:absent"))
