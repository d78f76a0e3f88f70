"""One small interface over Hugging Face tokenizers and bare SentencePiece models.

Prompt and completion are tokenised separately and joined: the ids of a prompt do not depend on what follows it.
A completion is tokenised as a continuation, so that no space is inserted or lost where the two meet:
`decode(encode_prompt(p) + encode_completion(c)) == p + c` as far as the tokenizer's normalisation keeps text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from exo_megatron.errors import DataError

Message: TypeAlias = Mapping[str, str]
"""A chat message, {"role": ..., "content": ...}."""

Text: TypeAlias = str | Sequence[Message]
"""A prompt or a completion: a string, or chat messages that the tokenizer's chat template turns into one."""

PROBE: tuple[Message, ...] = ({"role": "user", "content": "x"},)


class TextCodec(Protocol):
    """What the two kinds of tokenizers provide. `continuation`: the text follows other text, not begins one."""

    @property
    def vocab_size(self) -> int:
        """All ids are below this."""

    @property
    def text_vocab_size(self) -> int:
        """All ids are below this but those of special tokens that were added to the tokenizer."""

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by default: usually the beginning-of-sequence id, or nothing."""

    def encode(self, text: str, *, continuation: bool) -> list[int]:
        """Ids of the text alone."""

    def decode(self, ids: Sequence[int], *, continuation: bool) -> str:
        """Text of the ids without special tokens."""

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Messages through the chat template; DataError where there is none or it refuses them."""


class Tokenizer:
    """Text <-> token ids of one model."""

    def __init__(self, path: Path, codec: TextCodec, embedding_rows: int | None = None) -> None:
        """embedding_rows: of the model it is for, see `fitted_to`."""
        self.path = path
        self._codec = codec
        self._embedding_rows = embedding_rows

    @property
    def vocab_size(self) -> int:
        """Ids below this are those of the tokenizer that its model has, as far as it knows the model."""
        entries = self._codec.vocab_size
        return entries if self._embedding_rows is None else min(entries, self._embedding_rows)

    def fitted_to(self, embedding_rows: int) -> Tokenizer:
        """The tokenizer for a model with this many embedding rows.

        Raises DataError if ordinary text, or the end of a sequence, can have ids that the model lacks. Added special
        tokens that it lacks (of images, say) do no harm until a text spells one, which `vocab_size` lets a reader see.
        """
        entries = max(self._codec.text_vocab_size, self.eos_id + 1)
        if entries > embedding_rows:
            raise DataError(
                str(self.path),
                f"the tokenizer has {entries} entries, the model {embedding_rows} embedding rows",
                expected="a tokenizer with no more entries than the model's vocabulary",
                fix="use the tokenizer that belongs to the checkpoint (data.tokenizer)",
            )
        return Tokenizer(self.path, self._codec, embedding_rows)

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token, which ends completions."""
        return self._codec.eos_id

    def prompt_text(self, prompt: Text) -> str:
        """The prompt as one string; chat messages through the template, ready for the assistant's answer."""
        return prompt if isinstance(prompt, str) else self._codec.render(prompt, generation_prompt=True)

    def encode_prompt(self, prompt: Text) -> list[int]:
        """Ids of a prompt. A string gets the tokenizer's default prefix (BOS) unless its text begins with it.

        Chat messages get what the template writes and nothing else. Raises DataError without a chat template.
        """
        ids = self._codec.encode(self.prompt_text(prompt), continuation=False)
        prefix = list(self._codec.prefix_ids)
        if not isinstance(prompt, str) or ids[: len(prefix)] == prefix:
            return ids
        return prefix + ids

    def encode_completion(self, completion: Text, *, ended: bool = True) -> list[int]:
        """Ids of a completion, without BOS; with end-of-sequence at the end if it `ended` by itself.

        A completion of chat messages is what the template adds to a prompt for them, up to the last end-of-sequence.
        """
        ids = self._codec.encode(self._completion_text(completion), continuation=True)
        eos = self.eos_id
        if not isinstance(completion, str) and eos in ids:
            # Templates write more after the turn's end (a line break, say), which the model never generates.
            del ids[len(ids) - ids[::-1].index(eos) :]
        if ids and ids[-1] == eos:
            ids.pop()
        return [*ids, eos] if ended else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a whole sequence that begins with a prompt; special tokens are skipped."""
        return self._codec.decode(ids, continuation=False)

    def decode_completion(self, ids: Sequence[int]) -> str:
        """Text of a completion, with the space that parts it from its prompt; special tokens are skipped."""
        return self._codec.decode(ids, continuation=True)

    def _completion_text(self, completion: Text) -> str:
        if isinstance(completion, str):
            return completion
        before = self._codec.render(PROBE, generation_prompt=True)
        whole = self._codec.render((*PROBE, *completion), generation_prompt=False)
        if not whole.startswith(before):
            raise DataError(
                str(self.path),
                "the chat template does not write an answer as a continuation of its generation prompt",
                expected="a template whose conversation begins with the prompt rendered for generation",
                fix="correct the chat template, or give prompts and completions as strings",
            )
        return whole[len(before) :]


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer directory (Hugging Face files, or a lone tokenizer.model) or a SentencePiece .model file.

    Only local files are read and no code from the directory is run. Raises DataError if there is no tokenizer, it
    cannot be read, or it has no end-of-sequence token.
    """
    if path.is_file() and path.suffix == ".model":
        return _load_sentencepiece(path, path)
    if not path.is_dir():
        raise DataError(
            str(path), "is not a tokenizer", expected="a tokenizer directory or a .model file", fix="correct the path"
        )
    hugging_face = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not hugging_face and (path / "tokenizer.model").is_file():
        return _load_sentencepiece(path, path / "tokenizer.model")
    from exo_megatron.data.hf_codec import load_hf_codec

    return Tokenizer(path, load_hf_codec(path))


def _load_sentencepiece(path: Path, file: Path) -> Tokenizer:
    from exo_megatron.data.sentencepiece_codec import SentencePieceCodec

    return Tokenizer(path, SentencePieceCodec(file))
