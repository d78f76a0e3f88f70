"""A tiny random Llama checkpoint directory, complete with a tokenizer, as Hugging Face's tools would write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.reference.weights import draw_weights

VOCAB_SIZE = 101
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_WORD_ID = 3


@dataclass(frozen=True)
class EosTokenizer:
    """The id that ends a candidate, and ids as their numbers; all that a rollout asks of a tokenizer."""

    eos_id: int
    absent_ids: tuple[int, ...] = ()

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({self.eos_id})

    def decode_completion(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def tiny_config(*, tied: bool = False, rope_scaling: dict[str, Any] | None = None, **changes: Any) -> LlamaConfig:
    """4 layers, 4 heads of 16 with 2 key/value heads, odd vocabulary."""
    rope = {"rope_theta": 10000.0, **(rope_scaling or {"rope_type": "default"})}
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
    }
    return LlamaConfig(**(settings | changes))


def tiny_llama(config: LlamaConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model whose every parameter is drawn from `seed`. Attention is the eager one: plain matrix products, no kernel
    of its own.
    """
    return draw_weights(LlamaForCausalLM._from_config(config, attn_implementation="eager"), seed=seed, dtype=dtype)


def word(token_id: int) -> str:
    """The word whose token id is `token_id`."""
    return f"w{token_id}"


def text(token_ids: list[int] | tuple[int, ...]) -> str:
    """Words joined by spaces; tokenises back to exactly `token_ids`, which must be ordinary words."""
    return " ".join(word(token_id) for token_id in token_ids)


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Words w3, w4, ... at their ids; no token is added at either end."""
    vocabulary = {"<unk>": UNK_ID, "<s>": BOS_ID, "</s>": EOS_ID}
    vocabulary |= {word(token_id): token_id for token_id in range(FIRST_WORD_ID, vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=False
    )


def save_hf(model: PreTrainedModel, directory: Path) -> Path:
    """Write config, safetensors weights, generation config and tokenizer to `directory`."""
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, do_sample=True)
    model.save_pretrained(directory)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(directory)
    return directory
