"""Tiny random sequence classifiers of several Hugging Face classes, and a chat tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.reference.weights import draw_weights

USUAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

CLASSIFIERS: dict[str, tuple[str, dict[str, int], str | None]] = {
    "llama": ("Llama", USUAL, "max_position_embeddings"),
    "qwen2": ("Qwen2", USUAL | {"num_key_value_heads": 2}, "max_position_embeddings"),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "n_positions"),
    "bert": ("Bert", USUAL, "max_position_embeddings"),
    "roberta": ("Roberta", USUAL, "max_position_embeddings"),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}, None),
    "xlnet": ("XLNet", {"d_model": 32, "d_inner": 48, "n_layer": 2, "n_head": 2}, None),
}
"""HF's class names, sizes, and the name of the number of positions, if there is one."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""In the style of Llama 3: it writes BOS itself, and ends a turn with a token of its own."""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template, both of which write BOS."""
    begin, *further = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        ["hello world, how are you? the answer is forty two. user assistant system"] * 3, trainer
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (begin, *further)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=further[0])
    made.chat_template = TEMPLATE
    return made


def save_classifier(
    directory: Path, kind: str, tokenizer: PreTrainedTokenizerFast, *, positions: int = 128, **config: Any
) -> Path:
    """Write a classifier with 32 hidden units and its tokenizer; `config` is more of its configuration."""
    name, sizes, limit = CLASSIFIERS[kind]
    settings: dict[str, Any] = {"pad_token_id": None, "num_labels": 1, "vocab_size": len(tokenizer), **sizes}
    settings |= {} if limit is None else {limit: positions}
    made = getattr(transformers, f"{name}Config")(**(settings | config))
    model = getattr(transformers, f"{name}ForSequenceClassification")._from_config(made, attn_implementation="eager")
    draw_weights(model, seed=3).save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))
    return directory
