from __future__ import annotations

from pathlib import Path

import pytest

from exo_megatron.data import cache
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.data.loader import Loader
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


@pytest.fixture
def loader(tmp_path: Path, spm: Tokenizer) -> Loader:
    return Loader(tmp_path, spm)


@pytest.fixture(params=[2, 3, 2048])
def shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of few records, and one of all."""
    monkeypatch.setattr(cache, "SHARD_RECORDS", request.param)
