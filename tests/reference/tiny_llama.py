"""A tiny random Llama checkpoint directory, complete with a tokenizer, as Hugging Face's tools would write it.

Weights are far from their usual initial values (norm weights differ from one, logits spread over several nats), so
that a transposed, misplaced or forgotten tensor changes the results by much more than any tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 101
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_WORD_ID = 3


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
    """A model whose every parameter is drawn from `seed`: matrices and embeddings normal(0, 0.12), norm
    weights uniform(0.5, 1.5). Attention is the eager one: plain matrix products, no kernel of its own.
    """
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied embeddings appear once
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.12, generator=generator)
    return _with_parameters_in(model, dtype)


def _with_parameters_in(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """As from_pretrained does it: parameters change type, rotary frequencies stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def perturbed(model: LlamaForCausalLM, *, seed: int, scale: float) -> LlamaForCausalLM:
    """A copy of `model` with every parameter p multiplied by (1 + scale * normal): a policy near its reference."""
    copy = LlamaForCausalLM._from_config(model.config, attn_implementation="eager").to(torch.float32)
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1.0 + scale * noise)
    return _with_parameters_in(copy, model.dtype)


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


def save_hf(model: LlamaForCausalLM, directory: Path) -> Path:
    """Write config, safetensors weights, generation config and tokenizer to `directory`."""
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, do_sample=True)
    model.save_pretrained(directory)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(directory)
    return directory
