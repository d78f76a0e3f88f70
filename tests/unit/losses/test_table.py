"""The table of losses: what has no entry cannot train, and everything that names kinds reads the table."""

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
from exo_megatron.config.losses import COMMON_KEYS, FUNCTION, FUNCTION_KEYS, LOSSES, LossSpec, kinds_comparing
from exo_megatron.config.sections import LossConfig
from exo_megatron.config.stages import AlignConfig
from exo_megatron.errors import ConfigError
from exo_megatron.losses.objective import BUILT_IN, LossInputs, find_loss, group_objective, join_table, loss_spec

ROOT = Path(__file__).parents[3]
ROW = LossSpec("Eq. 0", "rewards", ("beta_pi",))


def zero(inputs: LossInputs) -> Tensor:
    return inputs.log_ratio.sum(dim=-1) * 0


def test_a_kind_without_a_row_or_without_a_function_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"without an entry .*\['b'\]"):
        join_table({"a": ROW}, {"a": zero, "b": zero})
    with pytest.raises(RuntimeError, match=r"without a function: \['a'\]"):
        join_table({"a": ROW}, {})
    assert BUILT_IN.keys() == LOSSES.keys()


def add_row(package: Path) -> None:
    table = package / "config" / "losses.py"
    text = table.read_text()
    assert text.count("LOSSES = {\n") == 1
    entry = '    "new_rw": LossSpec("Eq. 0", "rewards", ("beta_pi",)),\n'
    table.write_text(text.replace("LOSSES = {\n", "LOSSES = {\n" + entry))


def add_function(package: Path) -> None:
    table = package / "losses" / "objective.py"
    text = table.read_text()
    line = '    "exo_rw": lambda inputs: '
    assert text.count(line) == 1
    table.write_text(text.replace(line, '    "new_rw": lambda inputs: inputs.log_p_theta[:, 0],\n' + line))


@pytest.mark.parametrize("add", [add_row, add_function])
def test_half_a_kind_cannot_train(add: Callable[[Path], None], tmp_path: Path) -> None:
    """With only its entry, the schema accepts the kind, and with only its function nobody can ask for it: import fails.

    Before there was a table, such a kind trained EXO.
    """
    shutil.copytree(ROOT / "exo_megatron", tmp_path / "exo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    add(tmp_path / "exo_megatron")
    code = "import exo_megatron.training.objectives"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "kinds of loss without an entry in config/losses.py or without a function: ['new_rw']" in done.stderr


def test_a_kind_that_is_not_in_the_table_is_refused_by_the_schema_and_by_the_objective() -> None:
    with pytest.raises(ValueError, match="kind"):
        LossConfig(kind="kto")
    logps = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(KeyError):
        group_objective(logps, logps, logps, [2], LossConfig.model_construct(kind="kto"))


def test_keys_of_the_table_are_keys_of_the_configuration() -> None:
    known = set(LossConfig.model_fields)
    named = {key for spec in LOSSES.values() for key in spec.keys}
    assert named | set(COMMON_KEYS) | set(FUNCTION_KEYS) == known
    assert FUNCTION not in LOSSES


def test_help_and_documents_name_every_kind() -> None:
    (kind,) = [each for each in describe_keys(AlignConfig) if each.key == "loss.kind"]
    assert kind.accepts.removeprefix("one of ").split(", ") == [*LOSSES, FUNCTION]
    for name, spec in LOSSES.items():
        assert f"{name}: {spec.equation}" in kind.meaning
    assert kinds_comparing("rewards") == "exo_rw or dpo_rw"
    table = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| (\S.*?) \| (rewards|preference) \| (.*?) \|", table, re.MULTILINE)
    assert [(name, equation, compares, keys) for name, equation, compares, keys in documented] == [
        (name, spec.equation, spec.compares, ", ".join(f"`{key}`" for key in spec.keys))
        for name, spec in LOSSES.items()
    ]


@loss_spec(compares="preference", log_weights=True)
def weighted(inputs: LossInputs) -> Tensor:
    assert inputs.log_weights is not None
    return (inputs.log_weights.exp() * inputs.log_ratio).sum(dim=-1)


def plain(inputs: LossInputs) -> Tensor:
    assert inputs.rewards is not None
    return torch.where(inputs.mask, inputs.rewards * inputs.log_ratio, 0.0).sum(dim=-1)


def scalar(inputs: LossInputs) -> Tensor:
    return inputs.log_ratio.sum()


def failing(inputs: LossInputs) -> Tensor:
    raise KeyError("advantage")


def without_arguments() -> Tensor:
    return torch.zeros(1)


def number(inputs: LossInputs) -> float:
    return inputs.log_ratio.sum().item()


def detached(inputs: LossInputs) -> Tensor:
    return inputs.log_ratio.detach().sum(dim=-1)


class NotALoss:
    def __init__(self, inputs: LossInputs) -> None:
        self.inputs = inputs


@loss_spec(keys=("beta_pi",))
def scaled(inputs: LossInputs) -> Tensor:
    return inputs.config.beta_pi * inputs.log_ratio.sum(dim=-1)


def test_a_function_of_the_users_brings_its_spec() -> None:
    name = __name__
    logps = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    rewards = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    config = LossConfig(function=f"{name}:plain")
    assert config.kind == FUNCTION
    assert find_loss(config).spec.compares == "rewards"
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


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("failing", r"raised KeyError: 'advantage' \(in .*test_table.py:\d+\)"),
        ("without_arguments", r"raised TypeError: .*positional argument"),
        ("number", "returned a float"),
        ("NotALoss", "returned a NotALoss"),
        ("detached", "do not depend on the policy's log-probs, so that nothing would be trained"),
    ],
)
def test_a_function_of_the_users_that_fails_is_named(name: str, problem: str) -> None:
    logps = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    reference = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ConfigError, match=rf"loss.function .*:{name}: .*{problem}"):
        group_objective(logps, reference, reference, [2], LossConfig(function=f"{__name__}:{name}"))


def test_keys_that_a_function_does_not_use_are_refused() -> None:
    assert find_loss(LossConfig(function=f"{__name__}:scaled", beta_pi=3.0)).spec.compares == "rewards"
    with pytest.raises(ConfigError, match=r"loss.beta_r: got 3.0, which .*:scaled does not use"):
        find_loss(LossConfig(function=f"{__name__}:scaled", beta_r=3.0))


def test_a_wrong_spec_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compares=\.\.\.\): got 'prefrence'.*one of rewards, preference"):
        loss_spec(compares="prefrence")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"keys=\.\.\.\): got 'beta'"):
        loss_spec(keys=("beta",))


def test_arguments_of_another_loss_are_refused() -> None:
    """Each of these would otherwise give a number that is not the loss asked for."""
    five = torch.zeros(5, dtype=torch.float64)
    nll = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs rewards"):
        group_objective(five, five, None, [2, 3], LossConfig(kind="exo_rw"))
    with pytest.raises(ValueError, match=r"compares pairs, but group_sizes are \[2, 3\]"):
        group_objective(five, five, five, [2, 3], LossConfig(kind="ipo_pref"))
    for kind in ("exo_pref", "dpo_pref"):
        with pytest.raises(ValueError, match=r"compares two at least, but group_sizes are \[4, 1\]"):
            group_objective(five, five, five, [4, 1], LossConfig.model_validate({"kind": kind}))
    for sizes in ([2, 2], [3, 3]):
        with pytest.raises(ValueError, match=rf"sum to {sum(sizes)} for 5 candidates"):
            group_objective(five, five, five, sizes, LossConfig(kind="exo_rw"))
    with pytest.raises(ValueError, match=r"0.5 needs best_nll"):
        group_objective(five, five, five, [2, 3], LossConfig(nll_weight=0.5))
    with pytest.raises(ValueError, match=r"0.0 does not use best_nll"):
        group_objective(five, five, five, [2, 3], LossConfig(), best_nll=nll)
