"""Batches of a sequence classifier: their padding, which changes no score, and the longest text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding
from transformers.tokenization_utils_base import LARGE_INTEGER

POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Names of the number of positions in configurations; GPT-2's and others' names are mapped to the first."""

ROUNDING = 1e-3
"""Largest difference, relative to 1 + |logit|, of a text's logits alone and in a batch."""


def longest_text(model: Any, tokenizer: Any) -> int | None:
    """Return the largest number of tokens that the classifier takes, None if there is no limit.

    It is the number of positions, of which models in the manner of RoBERTa cannot use the first
    ones, up to that of padding; and the tokenizer's limit unless that stands for "none".
    """
    config = model.config.get_text_config()
    known = config.to_dict()
    limits = [known.get(config.attribute_map.get(name, name)) for name in POSITIONS]
    limits += [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, Embedding) and module.padding_idx is not None
    ]
    if tokenizer.model_max_length < LARGE_INTEGER:
        limits.append(int(tokenizer.model_max_length))
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


@torch.inference_mode()
def classify(model: Any, texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the logits [B, classes], in fp32, of texts given as ids, as each would have them alone.

    Texts are padded on the right, under an attention mask. Decoder-only classifiers read the last
    token that is not the padding token of their configuration, so texts are padded with that token.
    Where there is none they read the last one: the padding token is then, for this call, one that
    occurs in no text.
    """
    padding = _padding_id(model)
    if padding is not None:
        return _forward(model, texts, padding, device)
    used = {id for text in texts for id in text}
    unused = next((id for id in range(_entries(model)) if id not in used), None)
    if unused is None or len(texts) == 1:
        return classify_alone(model, texts, device)
    with _padding_with(model, unused):
        return _forward(model, texts, unused, device)


@torch.inference_mode()
def classify_alone(model: Any, texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the logits [B, classes], in fp32, of texts given as ids, one after the other."""
    return torch.cat([_forward(model, [text], 0, device) for text in texts])


def is_padding_harmless(model: Any, short: Sequence[int], long: Sequence[int], device: torch.device) -> bool:
    """Tell whether the scores of `short` alone and beside the longer text agree.

    They do not where a model reads its last position whatever the mask says, or mixes positions
    without a mask. Models with a decoder of their own are never asked: some want as many
    end-of-sequence tokens in all texts of a batch.
    """
    if model.config.is_encoder_decoder:
        return False
    alone, beside = classify_alone(model, [short], device)[0], classify(model, [short, long], device)[0]
    return bool(torch.all((alone - beside).abs() <= ROUNDING * (1 + alone.abs())))


def _padding_id(model: Any) -> int | None:
    """Return the id by which the classifier recognises padding, None if it has none."""
    padding: int | None = model.config.get_text_config().pad_token_id
    return None if padding is None or not 0 <= padding < _entries(model) else padding


def _entries(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


@contextmanager
def _padding_with(model: Any, padding: int) -> Iterator[None]:
    configs = [model.config, model.config.get_text_config()]
    before = [config.pad_token_id for config in configs]
    for config in configs:
        config.pad_token_id = padding
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.pad_token_id = value


def _forward(model: Any, texts: Sequence[Sequence[int]], padding: int, device: torch.device) -> Tensor:
    longest = max(len(text) for text in texts)
    ids = torch.tensor([[*text, *[padding] * (longest - len(text))] for text in texts], device=device)
    inputs = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        inputs["attention_mask"] = torch.tensor(mask, device=device)
    logits: Tensor = model(**inputs).logits
    return logits.float()
