"""One small interface to Hugging Face tokenizers and bare SentencePiece models.

Prompt and candidate are tokenised separately and joined: the ids of a prompt do not depend on the
text after it. A candidate is tokenised as a continuation, so that no space is inserted or lost
where the two meet: `decode(encode_prompt(p) + encode_completion(c)) == p + c` as far as the
tokenizer's normalisation keeps text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exo_megatron.data.text import Message, Text, TextCodec
from exo_megatron.errors import DataError

PROBE: tuple[Message, ...] = ({"role": "user", "content": "x"},)


class Tokenizer:
    """A converter between text and the token ids of one model."""

    def __init__(self, path: Path, codec: TextCodec, embedding_rows: int | None = None) -> None:
        """Wrap a codec for a model with `embedding_rows` (see `fitted_to`), None if unknown."""
        self.path = path
        self._codec = codec
        self._embedding_rows = embedding_rows

    @property
    def vocab_size(self) -> int:
        """The number above all ids that both the tokenizer and, if it is known, its model have."""
        entries = self._codec.vocab_size
        return entries if self._embedding_rows is None else min(entries, self._embedding_rows)

    def fitted_to(self, embedding_rows: int) -> Tokenizer:
        """Return the tokenizer for a model with `embedding_rows` embedding rows.

        Raises DataError if ordinary text, or the end of a sequence, can have ids that the model
        lacks. Added special tokens that it lacks (of images, for example) do no harm unless a text
        holds one; readers of data check this with `vocab_size`.
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
        """Id of the end-of-sequence token, which ends candidates."""
        return self._codec.eos_id

    def prompt_text(self, prompt: Text) -> str:
        """Return the prompt as one string.

        Chat messages are rendered with the template, ready for the assistant's message.
        """
        return prompt if isinstance(prompt, str) else self._codec.render(prompt, generation_prompt=True)

    def encode_prompt(self, prompt: Text) -> list[int]:
        """Return the ids of a prompt.

        A string gets the tokenizer's default prefix (BOS) unless its ids begin with it. Chat
        messages get what the template writes and nothing else. Raises DataError if there is no chat
        template.
        """
        ids = self._codec.encode(self.prompt_text(prompt), continuation=False)
        prefix = list(self._codec.prefix_ids)
        if not isinstance(prompt, str) or ids[: len(prefix)] == prefix:
            return ids
        return prefix + ids

    def encode_completion(self, completion: Text, *, ended: bool = True) -> list[int]:
        """Return the ids of a candidate without BOS, with end-of-sequence last if it is `ended`.

        A candidate of chat messages is the text that the template adds to a prompt for them, up to
        the last end-of-sequence.
        """
        ids = self._codec.encode(self._completion_text(completion), continuation=True)
        eos = self.eos_id
        if not isinstance(completion, str) and eos in ids:
            # Templates write more after the turn's end (for example a line break), which the model
            # never generates.
            del ids[len(ids) - ids[::-1].index(eos) :]
        if ids and ids[-1] == eos:
            ids.pop()
        return [*ids, eos] if ended else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a whole sequence that begins with a prompt, without special tokens."""
        return self._codec.decode(ids, continuation=False)

    def decode_completion(self, ids: Sequence[int]) -> str:
        """Return the text of a candidate, its leading space included, without special tokens."""
        return self._codec.decode(ids, continuation=True)

    def _completion_text(self, completion: Text) -> str:
        if isinstance(completion, str):
            return completion
        before = self._codec.render(PROBE, generation_prompt=True)
        whole = self._codec.render((*PROBE, *completion), generation_prompt=False)
        if not whole.startswith(before):
            raise DataError(
                str(self.path),
                "the chat template does not write a completion as a continuation of its generation prompt",
                expected="a template whose conversation begins with the prompt rendered for generation",
                fix="correct the chat template, or give prompts and completions as strings",
            )
        return whole[len(before) :]


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer directory or a SentencePiece .model file.

    The directory holds Hugging Face files, or only a tokenizer.model. Only local files are read,
    and no code from the directory is run. Raises DataError if there is no tokenizer, it cannot be
    read, or it has no end-of-sequence token.
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
