from __future__ import annotations

from pathlib import Path

import pytest

from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.data.tokenizers_made_here import hf_directory, sentencepiece_model


@pytest.fixture(scope="session")
def spm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE SentencePiece model with SentencePiece's default normalisation."""
    return sentencepiece_model(tmp_path_factory.mktemp("spm") / "review.model")


@pytest.fixture(scope="session")
def spm(spm_file: Path) -> Tokenizer:
    return load_tokenizer(spm_file)


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level HF tokenizer with a chat template."""
    return load_tokenizer(hf_directory(tmp_path_factory.mktemp("chat"), "bytes"))
