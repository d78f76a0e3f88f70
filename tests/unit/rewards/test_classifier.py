"""Rewards from a sequence classifier on disk, against transformers called by hand on one text at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from exo_megatron.config.sections import RewardConfig
from exo_megatron.errors import RewardError
from exo_megatron.rewards.build import build_reward
from exo_megatron.rewards.classifier import logits_to_rewards
from tests.reference.tiny_llama import VOCAB_SIZE, tiny_tokenizer, word

PROMPTS = [f"{word(5)} {word(6)}", word(7), f"{word(8)} {word(9)} {word(10)}"]
COMPLETIONS = [f" {word(11)}", f" {word(12)} {word(13)} {word(14)} {word(15)}", f" {word(5)}"]


def save_classifier(directory: Path, labels: int, *, padding: bool = False, positions: int = 64) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        num_labels=labels,
        pad_token_id=0 if padding else None,
    )
    torch.manual_seed(labels)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.normal_(0.0, 1.0)
    model.save_pretrained(str(directory))
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.save_pretrained(str(directory))
    return directory


def logits_by_hand(directory: Path) -> torch.Tensor:
    """One text at a time, so that there is no padding."""
    model = LlamaForSequenceClassification.from_pretrained(str(directory)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
    rows = []
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            hidden = model.model(**tokenizer(prompt + completion, return_tensors="pt")).last_hidden_state
            rows.append(model.score(hidden[0, -1]))
    return torch.stack(rows)


def score(config: RewardConfig) -> list[float]:
    return build_reward(config, torch.device("cpu")).score(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("padding", [False, True])
def test_the_single_logit_of_a_reward_model(tmp_path: Path, padding: bool) -> None:
    save_classifier(tmp_path, 1, padding=padding)
    expected = logits_by_hand(tmp_path)[:, 0].tolist()
    assert max(expected) - min(expected) > 0.1
    for batch_size in (1, 2, 32):
        rewards = score(RewardConfig(kind="hf_classifier", path=tmp_path, batch_size=batch_size))
        assert rewards == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("label", [0, 2])
def test_log_odds_of_a_class(tmp_path: Path, label: int) -> None:
    save_classifier(tmp_path, 3)
    p = logits_by_hand(tmp_path).double().softmax(dim=1)[:, label]
    rewards = score(RewardConfig(kind="hf_classifier", path=tmp_path, label=label, batch_size=2))
    assert rewards == pytest.approx((p / (1 - p)).log().tolist(), abs=1e-4)


def test_log_odds_of_a_certain_class_are_finite() -> None:
    assert logits_to_rewards(torch.tensor([[400.0, 0.0]]), 0).tolist() == [400.0]


@pytest.mark.parametrize(("labels", "label"), [(1, 0), (2, None), (2, 2)])
def test_label_that_does_not_fit(tmp_path: Path, labels: int, label: int | None) -> None:
    save_classifier(tmp_path, labels)
    with pytest.raises(RewardError, match=f"{labels} outputs? and reward.label is {label}"):
        score(RewardConfig(kind="hf_classifier", path=tmp_path, label=label))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, 1)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RewardError, match=r"pickled \.bin is refused"):
        score(RewardConfig(kind="hf_classifier", path=tmp_path))


def test_code_in_the_directory_is_not_run(tmp_path: Path) -> None:
    save_classifier(tmp_path, 1)
    config = tmp_path / "config.json"
    text = config.read_text().replace('"model_type": "llama"', '"model_type": "mine"')
    config.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "evil.Config"},', 1))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(RewardError, match="transformers cannot load it"):
        score(RewardConfig(kind="hf_classifier", path=tmp_path))
    assert not (tmp_path / "ran").exists()


def test_text_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, 1, positions=4)
    with pytest.raises(RewardError, match="tokens; expected at most 4"):
        score(RewardConfig(kind="hf_classifier", path=tmp_path))
