"""The end of a candidate that ends by itself: stop tokens and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from exo_megatron.config.sections import SamplingConfig
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.errors import ConfigError


class StopRule:
    """A candidate ends with a stop token of the tokenizer or of `sampling`, or once it has a stop string.

    It keeps what ended it: the stop token, or the whole token that completes the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingConfig) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.stop_ids.union(sampling.stop_token_ids)
        self._strings = sampling.stop
        # Tokens of fewer bytes than one do not exist, but special tokens have no text.
        self._window = 2 * max((len(string.encode()) for string in self._strings), default=0) + 4

    def ends(self, tokens: Sequence[int]) -> bool:
        """Tell whether a candidate that had not ended before its last token has ended with it."""
        if tokens[-1] in self._ids:
            return True
        if not self._strings:
            return False
        tail = self._tokenizer.decode_completion(tokens[-self._window :])
        return any(string in tail for string in self._strings)


def check_stops(tokenizer: Tokenizer, sampling: SamplingConfig) -> None:
    """Raise ConfigError for a stop token that the tokenizer does not have."""
    absent = set(tokenizer.absent_ids)
    for id in sampling.stop_token_ids:
        if id >= tokenizer.vocab_size or id in absent:
            raise ConfigError(
                "sampling.stop_token_ids",
                f"got {id}, which is no token of {tokenizer.path}",
                expected=f"ids of tokens, below {tokenizer.vocab_size}",
                fix="correct it",
            )
