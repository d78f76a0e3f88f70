"""What ends a candidate: stop tokens and stop strings."""

from __future__ import annotations

from pathlib import Path

import pytest

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.errors import ConfigError
from exo_megatron.rollout.stops import StopRule, check_stops
from tests.unit.data.tokenizers_made_here import hf_directory, sentencepiece_model


@pytest.fixture(scope="module", params=["bytes", "metaspace", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("stops")
    if request.param == "sentencepiece":
        return load_tokenizer(sentencepiece_model(path / "tokenizer.model"))
    return load_tokenizer(hf_directory(path, request.param))


def length(rule: StopRule, ids: list[int]) -> int:
    """Tokens of a candidate that would go on with `ids`."""
    return next((count for count in range(1, len(ids) + 1) if rule.ends(ids[:count])), len(ids))


def test_stop_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_completion(" was good", prompt="The movie")
    assert length(StopRule(tokenizer, SamplingConfig()), ids) == len(ids)
    assert length(StopRule(tokenizer, SamplingConfig(stop_token_ids=(ids[0],))), ids) == 1


@pytest.mark.parametrize("stop", [" good", "ie was", "é", "d .", "\n\n"])
def test_stop_strings(tokenizer: Tokenizer, stop: str) -> None:
    """The first token with which the text of the candidate has the string is the last."""
    ids = tokenizer.encode_completion(f" The movie was{stop} and more{stop} of it", prompt="x")
    found = length(StopRule(tokenizer, SamplingConfig(stop=("never", stop))), ids)
    whole = stop in tokenizer.decode_completion(ids)
    assert whole == (stop in tokenizer.decode_completion(ids[:found])) and (found < len(ids)) == whole
    assert stop not in tokenizer.decode_completion(ids[: found - 1])


def test_ids_that_the_tokenizer_lacks_are_refused(tokenizer: Tokenizer) -> None:
    check_stops(tokenizer, SamplingConfig(stop_token_ids=(3,)))
    with pytest.raises(ConfigError, match=r"sampling.stop_token_ids: got 99999, which is no token of .*; fix"):
        check_stops(tokenizer, SamplingConfig(stop_token_ids=(3, 99999)))
    with pytest.raises(ConfigError, match=rf"got {tokenizer.vocab_size}, which is no token"):
        check_stops(tokenizer.fitted_to(4096), SamplingConfig(stop_token_ids=(tokenizer.vocab_size,)))
