"""A tokenizer of a corpus and a small random Llama, as a Hugging Face checkpoint."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from exo_megatron.utils.files import atomic_open, write_json

LARGEST_VOCABULARY = 2048
MAX_POSITIONS = 512
BOS, EOS = 1, 2


def train_tokenizer(texts: Sequence[str], directory: Path) -> None:
    """Write tokenizer.model (SentencePiece BPE with byte fallback) and the files that AutoTokenizer reads.

    Room for every word and its parts as far as LARGEST_VOCABULARY allows; 259 entries are bytes and special tokens.
    """
    words = {word for text in texts for word in text.split()}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=min(300 + 2 * len(words), LARGEST_VOCABULARY),
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        bos_id=BOS,
        eos_id=EOS,
        minloglevel=2,
    )
    with atomic_open(directory / "tokenizer.model", "wb") as file:
        file.write(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    write_json(directory / "tokenizer_config.json", {**settings, "model_max_length": MAX_POSITIONS})
    AutoTokenizer.from_pretrained(str(directory)).save_pretrained(str(directory))


def write_model(directory: Path, *, seed: int) -> int:
    """Write a random Llama for the tokenizer in `directory` beside it; the number of its parameters."""
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    logging.disable_progress_bar()
    model = LlamaForCausalLM(config)
    model.save_pretrained(str(directory))
    return sum(parameter.numel() for parameter in model.parameters())
