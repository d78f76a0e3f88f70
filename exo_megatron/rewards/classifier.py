"""Rewards from a local Hugging Face sequence classifier.

It is a reward model with one output, or a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from exo_megatron.errors import RewardError
from exo_megatron.rewards.function import shorten


class ClassifierReward:
    """A reward source that classifies prompt + candidate with a sequence classifier.

    The reward is the single logit of a reward model, or the log-odds of one class of a classifier.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, label: int | None, batch_size: int, device: torch.device, where: str
    ) -> None:
        self._model = model.to(device).eval()
        self._tokenizer = tokenizer
        self._label = label
        self._batch_size = batch_size
        self._device = device
        self._where = where

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Classify the whole texts in batches of `batch_size`.

        Raises RewardError if a text is too long for the classifier.
        """
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        for start in range(0, len(texts), self._batch_size):
            rewards += self._score_batch(texts[start : start + self._batch_size])
        return rewards

    @torch.inference_mode()
    def _score_batch(self, texts: Sequence[str]) -> list[float]:
        encoded = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        self._check_length(encoded["attention_mask"], texts)
        logits: Tensor = self._model(**encoded.to(self._device)).logits
        values: list[float] = logits_to_rewards(logits.float(), self._label).tolist()
        return values

    def _check_length(self, mask: Tensor, texts: Sequence[str]) -> None:
        lengths = mask.sum(dim=1)
        longest = int(lengths.argmax())
        positions: int | None = self._model.config.to_dict().get("max_position_embeddings")
        limit = min(
            self._tokenizer.model_max_length, self._tokenizer.model_max_length if positions is None else positions
        )
        if lengths[longest] > limit:
            raise RewardError(
                self._where,
                f"the text {shorten(texts[longest])} has {int(lengths[longest])} tokens",
                expected=f"at most {limit}, the classifier's positions",
                fix="draw shorter candidates (sampling.max_new_tokens), or use another classifier",
            )


def logits_to_rewards(logits: Tensor, label: int | None) -> Tensor:
    """Convert logits [B, classes] to rewards [B].

    The reward is the only logit where label is None, else log p(label) - log p(not label). These
    log-odds under a softmax are the label's logit minus the log-sum-exp of the others.
    """
    if label is None:
        return logits.squeeze(1)
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - others.logsumexp(dim=1)


def load_classifier(path: Path, *, label: int | None, batch_size: int, device: torch.device) -> ClassifierReward:
    """Load model and tokenizer from local files, weights from safetensors only, in fp32.

    None of their code is run. Raises RewardError if there are no such files, they cannot be loaded,
    or `label` does not fit the number of classes.
    """
    where = f"reward.path {path}"
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise RewardError(
            where,
            "holds no config.json with *.safetensors",
            expected="the directory of an HF sequence classifier with safetensors weights (pickled .bin is refused)",
            fix="correct the path, or save the model again with save_pretrained(safe_serialization=True)",
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **options)
        model = AutoModelForSequenceClassification.from_pretrained(
            str(path), use_safetensors=True, dtype=torch.float32, **options
        )
    # transformers raises many unrelated types for files that it cannot use.
    except Exception as error:
        raise RewardError(
            where,
            f"transformers cannot load it ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            expected="an HF sequence classifier and its tokenizer",
            fix="correct the path, or save model and tokenizer with save_pretrained",
        ) from error
    _check_label(label, model.config.num_labels, where)
    _set_padding(model, tokenizer, where)
    return ClassifierReward(
        model, tokenizer, label=label, batch_size=batch_size, device=device, where=f"reward.path {path}"
    )


def _check_label(label: int | None, classes: int, where: str) -> None:
    if (classes == 1) != (label is None) or (label is not None and label >= classes):
        raise RewardError(
            where,
            f"the model has {classes} output{'s' if classes > 1 else ''} and reward.label is {label}",
            expected="no label for a single output" if classes == 1 else f"a label from 0 to {classes - 1}",
            fix="remove reward.label" if classes == 1 else "set reward.label to the class that is rewarded",
        )


def _set_padding(model: Any, tokenizer: Any, where: str) -> None:
    """Set the padding token, by which decoder-only classifiers find the last token of a text.

    It is the tokenizer's, else the model's, else the end-of-sequence token. Raises RewardError if
    there is none of them.
    """
    if tokenizer.pad_token_id is None and model.config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RewardError(
                where,
                "the tokenizer has neither a padding nor an end-of-sequence token",
                expected="pad_token in tokenizer_config.json",
                fix="name a padding token there",
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
