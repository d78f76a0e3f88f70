"""Rewards from a local Hugging Face sequence classifier.

It is a reward model with one output, or a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from exo_megatron.errors import RewardError, reason
from exo_megatron.rewards.classifier_batch import classify, classify_alone, is_padding_harmless, longest_text
from exo_megatron.rewards.classifier_ids import ClassifierInput
from exo_megatron.rewards.source import Completion
from exo_megatron.utils.files import check_regular_files

PROBES = (3, 8)
"""Lengths of two texts that are classified when the model is loaded."""


class ClassifierReward:
    """A reward source that classifies whole conversations or texts with a sequence classifier.

    The reward is the single logit of a reward model, or the log-odds of one class of a classifier.
    `tell` gets a line for each thing that the user should know.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        label: int | None,
        batch_size: int,
        device: torch.device,
        where: str,
        tell: Callable[[str], object],
    ) -> None:
        self._model = model.to(device).eval()
        self._input = ClassifierInput(tokenizer, where, tell)
        self._limit = longest_text(model, tokenizer)
        self._label = label
        self._batch_size = batch_size
        self._device = device
        self._where = where
        self._classify = self._choose_batching(tell)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Classify the completions in batches of `batch_size`.

        Raises RewardError if a text is too long for the classifier.
        """
        texts = [self._checked(completion, self._input.ids(completion)) for completion in completions]
        rewards: list[float] = []
        for start in range(0, len(texts), self._batch_size):
            logits = self._classify(self._model, texts[start : start + self._batch_size], self._device)
            rewards += logits_to_rewards(logits, self._label).tolist()
        return rewards

    def _checked(self, completion: Completion, ids: list[int]) -> list[int]:
        if self._limit is not None and len(ids) > self._limit:
            raise RewardError(
                completion.where,
                f"has {len(ids)} tokens for the classifier, prompt included",
                expected=f"at most {self._limit}, the positions of {self._where}",
                fix="draw shorter candidates (sampling.max_new_tokens), or use another classifier",
            )
        if not ids:
            raise RewardError(
                completion.where, "has no token for the classifier", expected="text", fix="remove the record"
            )
        return ids

    def _choose_batching(
        self, tell: Callable[[str], object]
    ) -> Callable[[Any, Sequence[list[int]], torch.device], Tensor]:
        """Choose batches of padded texts, or one text at a time where padding changes the scores.

        Raises RewardError if the model cannot classify a short text.
        """
        short, long = (self._input.probe(length)[: self._limit] for length in PROBES)
        try:
            if is_padding_harmless(self._model, short, long, self._device):
                return classify
        # Models of any kind may be in the directory, and fail in any way.
        except Exception as error:
            raise RewardError(
                self._where,
                f"cannot classify a short text ({type(error).__name__}: {reason(error)})",
                expected="a sequence classifier of text",
                fix="try it with transformers alone, or use another classifier",
            ) from error
        tell(f"{self._where}: padding changes the scores of this model, so it gets one text at a time")
        return classify_alone


def logits_to_rewards(logits: Tensor, label: int | None) -> Tensor:
    """Convert logits [B, classes] to rewards [B].

    The reward is the only logit where label is None, else log p(label) - log p(not label). These
    log-odds under a softmax are the label's logit minus the log-sum-exp of the others.
    """
    if label is None:
        return logits.squeeze(1)
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - others.logsumexp(dim=1)


def load_classifier(
    path: Path, *, label: int | None, batch_size: int, device: torch.device, tell: Callable[[str], object]
) -> ClassifierReward:
    """Load model and tokenizer from local files, weights from safetensors only, in fp32.

    None of their code is run. Raises RewardError if there are no such files, they cannot be loaded,
    weights are missing (such as the head of the classifier), or `label` does not fit the number of
    classes.
    """
    where = f"reward.path {path}"
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise RewardError(
            where,
            "holds no config.json with *.safetensors",
            expected="the directory of an HF sequence classifier with safetensors weights (pickled .bin is refused)",
            fix="correct the path, or save the model again with save_pretrained(safe_serialization=True)",
        )
    check_regular_files(path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **options)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            str(path), use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    # transformers raises many unrelated types for files that it cannot use.
    except Exception as error:
        raise RewardError(
            where,
            f"transformers cannot load it ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            expected="an HF sequence classifier and its tokenizer",
            fix="correct the path, or save model and tokenizer with save_pretrained",
        ) from error
    _check_complete(loaded["missing_keys"], type(model).__name__, where)
    if loaded["unexpected_keys"]:
        tell(f"{where}: {type(model).__name__} has no use for {_some(loaded['unexpected_keys'])} of the weights")
    _check_label(label, model.config.num_labels, where)
    return ClassifierReward(model, tokenizer, label=label, batch_size=batch_size, device=device, where=where, tell=tell)


def _check_complete(missing: Collection[str], kind: str, where: str) -> None:
    """Raise RewardError for weights that the files lack, which transformers draws at random."""
    if missing:
        raise RewardError(
            where,
            f"its files lack {_some(missing)} of {kind}, which would be random numbers",
            expected="all weights of the classifier, its head included (a language model has none)",
            fix="give the directory of a trained reward model, saved with save_pretrained",
        )


def _some(names: Collection[str], shown: int = 3) -> str:
    """Return names as text, the first ones only if there are many."""
    first = ", ".join(sorted(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def _check_label(label: int | None, classes: int, where: str) -> None:
    if (classes == 1) != (label is None) or (label is not None and label >= classes):
        raise RewardError(
            where,
            f"the model has {classes} output{'s' if classes > 1 else ''} and reward.label is {label}",
            expected="no label for a single output" if classes == 1 else f"a label from 0 to {classes - 1}",
            fix="remove reward.label" if classes == 1 else "set reward.label to the class that is rewarded",
        )
