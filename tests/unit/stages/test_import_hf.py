"""What an import says of the tokenizer beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from exo_megatron.errors import DataError
from exo_megatron.stages.import_hf import check_tokenizer_files
from tests.reference.tiny_llama import tiny_tokenizer
from tests.unit.checkpoint.conftest import SPEC


def spec(vocab_size: int):
    return SPEC.model_copy(update={"vocab_size": vocab_size})


def test_all_is_well(tmp_path: Path):
    tiny_tokenizer(20).save_pretrained(tmp_path)
    assert check_tokenizer_files(tmp_path, spec(20)) == check_tokenizer_files(tmp_path, spec(30)) == []


def test_no_tokenizer(tmp_path: Path):
    (note,) = check_tokenizer_files(tmp_path, spec(20))
    assert note.startswith(f"note: {tmp_path} has no tokenizer")


def test_a_tokenizer_that_needs_code_of_its_own(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer", "auto_map": {}}')
    (note,) = check_tokenizer_files(tmp_path, spec(20))
    assert "is copied but cannot be used" in note


def test_more_words_than_rows(tmp_path: Path):
    tiny_tokenizer(20).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="20 entries, the model 19 embedding rows"):
        check_tokenizer_files(tmp_path, spec(19))


def test_special_tokens_that_the_model_lacks(tmp_path: Path):
    tokenizer = tiny_tokenizer(20)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    (note,) = check_tokenizer_files(tmp_path, spec(20))
    assert "special tokens from id 20 on, which the model lacks" in note
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="22 entries"):
        check_tokenizer_files(tmp_path, spec(20))
