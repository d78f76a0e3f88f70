"""A bare SentencePiece model as a text codec."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from exo_megatron.data.text import Chat
from exo_megatron.errors import DataError, reason


class SentencePieceCodec:
    """A SentencePiece model, with and without the space that it puts before a text (dummy prefix).

    A continuation is encoded and decoded without that space, so " was good" keeps its own space and
    "ly good" gets none. Runs of spaces and spaces at the ends are kept even if the model was
    trained to drop them, because prompt and candidate are joined. BOS comes first if the model has
    one, as in the models' own frameworks.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined]  # generated
            model.normalizer_spec.remove_extra_whitespaces = False
            self._start = SentencePieceProcessor(model_proto=model.SerializeToString())
            self.description = hashlib.sha256(file.read_bytes()).hexdigest()
            model.normalizer_spec.add_dummy_prefix = False
            self._continuation = SentencePieceProcessor(model_proto=model.SerializeToString())
        # protobuf's DecodeError has no stable base class; a damaged model can also raise OSError
        # or RuntimeError.
        except Exception as error:
            raise DataError(
                str(file),
                f"is not a SentencePiece model ({reason(error)})",
                expected="a .model file",
                fix="restore the file",
            ) from None
        self.ids = frozenset(range(self._start.get_piece_size()))
        self.special_ids: frozenset[int] = frozenset()
        self.eos_id: int = self._start.eos_id()
        if self.eos_id < 0:
            raise DataError(
                str(file),
                "the SentencePiece model has no end-of-sequence token",
                expected="a model trained with eos_id >= 0",
                fix="train it with --eos_id, or use a Hugging Face tokenizer that names eos_token",
            )
        bos = self._start.bos_id()
        self.prefix_ids: tuple[int, ...] = (bos,) if bos >= 0 else ()

    def encode(self, text: str, *, continuation: bool) -> list[int]:
        """Return the ids of the text; control symbols written out in it are ordinary text."""
        ids: list[int] = (self._continuation if continuation else self._start).encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str], *, continuation: bool) -> list[list[int]]:
        """Return the ids of each of the texts, the same as `encode`, in one thread."""
        ids: list[list[int]] = (self._continuation if continuation else self._start).encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int], *, continuation: bool) -> str:
        """Return the text of the ids; control symbols give nothing."""
        text: str = (self._continuation if continuation else self._start).decode(list(ids))
        return text

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens included."""
        pieces: list[str] = [self._start.id_to_piece(id) for id in ids]
        return "".join(pieces).replace("▁", " ")

    def render(self, chat: Chat, *, generation_prompt: bool) -> NoReturn:
        """Raise DataError: a SentencePiece model has no chat template."""
        raise DataError(
            str(self.path),
            "a bare SentencePiece model has no chat template, and the data has chat messages",
            expected="a tokenizer with a chat template, or prompts and completions as strings",
            fix="use a Hugging Face tokenizer with chat_template, or write the data as strings",
        )
