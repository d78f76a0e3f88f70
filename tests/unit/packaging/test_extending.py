"""The blocks of docs/extending.md and docs/api.md, run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from exo_megatron.config.losses import LOSSES
from exo_megatron.config.sections import LossConfig
from exo_megatron.losses.objective import find_loss, group_objective
from exo_megatron.rewards.function import load_reward_function
from tests.reference.completions import completions

ROOT = Path(__file__).parents[3]
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
MOST_LINES = 14


def blocks(section: str, language: str) -> list[str]:
    """The blocks of one language below a heading of docs/extending.md."""
    text = re.split(rf"^## {section}$", EXTENDING, flags=re.MULTILINE)[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def block(section: str, language: str) -> str:
    (found,) = blocks(section, language)
    return str(found)


@pytest.fixture
def user_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that modules are imported from, which are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) & {"my_losses", "my_rewards"} - before:
        del sys.modules[name]


def test_every_extension_is_short() -> None:
    for section in ("A loss", "A reward source", "A metric", "A sampler option", "A model family"):
        lines = [line for text in blocks(section, "python") for line in text.splitlines() if line.strip()]
        for text in blocks(section, "diff"):
            lines += [line for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")]
        assert 0 < len(lines) <= MOST_LINES, section


def test_a_loss(user_modules: Path) -> None:
    (user_modules / "my_losses.py").write_text(block("A loss", "python"))
    config = LossConfig.model_validate(yaml.safe_load(block("A loss", "yaml"))["loss"])
    loss = find_loss(config)
    assert (loss.spec.compares, loss.spec.keys) == ("preference", ("function", "beta_pi"))

    logps = torch.tensor([-3.0, -5.0, -20.0, -4.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-4.0, -4.5, -4.0, -4.0], dtype=torch.float64)
    losses = group_objective(logps, reference, None, [2, 2], config).losses
    assert losses.tolist() == pytest.approx([1 - 0.1 * 1.5, 1 + 0.1 * 16])
    losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-0.1, 0.1, -0.1, 0.1])


def test_the_columns_of_a_loss_are_documented() -> None:
    table = set(re.findall(r"^\| `(\w+)=", EXTENDING, re.MULTILINE))
    assert table == set(LOSSES["exo_rw"].__dataclass_fields__) - {"equation"}


def test_a_reward_source(user_modules: Path) -> None:
    (user_modules / "my_rewards.py").write_text(block("A reward source", "python"))
    name = yaml.safe_load(block("A reward source", "yaml"))["reward"]["function"]
    assert load_reward_function(name).score(completions(["p", "p"], ["yes.", "no"])) == pytest.approx([0.96, -0.02])
    judged = completions(["p"] * 3, ["17 + 5 = 22", "it is 5", "who knows"], answer=[22, 22, 22])
    assert load_reward_function("my_rewards:right_number").score(judged) == [1.0, 0.0, 0.0]


CHECKS = {
    "A metric": """
import torch
from exo_megatron.config.sections import LossConfig
from exo_megatron.losses.objective import group_objective, statistic_names

config = LossConfig(kind="exo_rw", beta_pi=1.0)
found = group_objective(*torch.tensor([[-1.0, -2.0], [-1.0, -1.0], [1.0, 0.0]]).double(), [2], config)
assert "exo/p_worst" in statistic_names(config)
assert abs(float(found.statistics["exo/p_worst"]) - 1 / (1 + 2.718281828459045)) < 1e-12
""",
    "A sampler option": """
import torch
from exo_megatron.cli.help import command_help
from exo_megatron.config.sections import SamplingConfig
from exo_megatron.rollout.sampling import draw_tokens

logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
uniform = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
places = torch.zeros(1000, dtype=torch.int64)
for min_p, drawn in ((0.0, {0, 1, 2, 3}), (0.2, {0, 1, 2}), (0.5, {0, 1})):
    tokens, _ = draw_tokens(logits, places, uniform, SamplingConfig(temperature=1.0, min_p=min_p))
    assert set(tokens.tolist()) == drawn, (min_p, drawn)
assert "sampling.min_p" in command_help("rollout")
""",
    "A model family": """
import torch
import transformers
from exo_megatron.cli.main import main

config = transformers.SeedOssConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, attention_bias=True, attention_out_bias=False,
)
torch.manual_seed(0)
model = transformers.SeedOssForCausalLM(config)
for name, parameter in model.named_parameters():
    if name.endswith("bias"):
        torch.nn.init.normal_(parameter)
model.save_pretrained("seed")
assert main(["import", "hf=seed", "output=checkpoint", "verify=true"]) == 0
""",
}


@pytest.mark.parametrize("section", CHECKS)
def test_an_addition_to_the_package(section: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "exo_megatron", tmp_path / "exo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in blocks(section, "diff"):
        apply(diff, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECKS[section]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if section == "A model family":
        assert re.search(r"tensors .* pass", done.stdout)
        assert re.search(r"logits .* pass", done.stdout)


def apply(diff: str, root: Path) -> None:
    """Change the files of a diff whose hunks have no line numbers: what they replace is there exactly once."""
    for part in re.split(r"^--- .*\n", diff, flags=re.MULTILINE)[1:]:
        name, *hunks = re.split(r"^@@\n", part, flags=re.MULTILINE)
        path = root / name.removeprefix("+++ b/").strip()
        text = path.read_text() if path.exists() else ""
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert text.count(old) == 1 or (not old and not text), f"{path.name} does not hold once:\n{old}"
            text = text.replace(old, new) if old else new
        path.write_text(text)


def test_the_api_runs_as_documented() -> None:
    names: dict[str, Any] = {}
    texts = re.findall(r"```python\n(.*?)```", API, re.DOTALL)
    assert len(texts) == 3
    for text in texts[:1]:
        exec(compile(text, "docs/api.md", "exec"), names)
    # Log-ratios -0.5, -0.5 and -2, rewards 0.3, 1.2 and -0.4: candidate 1 is to gain, the others are to lose.
    assert names["logps"].grad.sign().tolist() == [[1.0, -1.0, 1.0]]
    for text in texts[1:]:
        exec(compile(text, "docs/api.md", "exec"), names)
    assert names["objective"].losses.shape == (2,)
    assert bool((names["objective"].losses > 0).all())
    assert names["logps"].grad.shape == (5,)
    assert names["group"].num_tokens == 7
    assert names["config"].loss.kind == "exo_rw"


def test_the_api_is_documented_whole() -> None:
    import exo_megatron

    documented = set(re.findall(r"^\| `(\w+)", API, re.MULTILINE))
    assert documented == set(exo_megatron.__all__) - {"__version__"}
    for name in exo_megatron.__all__:
        assert getattr(exo_megatron, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = exo_megatron.no_such_name
    assert dir(exo_megatron) == sorted(exo_megatron.__all__)


def test_the_package_and_a_mistake_in_a_configuration_load_no_torch(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("loss: {kind: exo}\n")
    code = """
import sys
import exo_megatron
from exo_megatron import AlignConfig, Group, LossConfig, RewardSource
from exo_megatron.cli.main import main
assert main(["align", "--config", sys.argv[1]]) == 2
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "wrong.yaml")], check=True, timeout=60)
