"""Text of the data, as strings or chat messages, and the interface that makes it token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

Message: TypeAlias = Mapping[str, str]
"""A chat message, {"role": ..., "content": ...}."""

Text: TypeAlias = str | Sequence[Message]
"""A prompt or a candidate: a string, or chat messages for the tokenizer's chat template."""


class TextCodec(Protocol):
    """One of the two kinds of tokenizers.

    `continuation` means that the text follows other text and does not begin one.
    """

    @property
    def vocab_size(self) -> int:
        """The smallest number above all ids."""

    @property
    def text_vocab_size(self) -> int:
        """The smallest number above all ids, except those of special tokens that were added."""

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts before a text by default: usually the BOS id, or none."""

    def encode(self, text: str, *, continuation: bool) -> list[int]:
        """Return the ids of the text alone, without the default prefix."""

    def decode(self, ids: Sequence[int], *, continuation: bool) -> str:
        """Return the text of the ids without special tokens."""

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Render messages with the chat template.

        Raises DataError if there is no template or it refuses the messages.
        """
