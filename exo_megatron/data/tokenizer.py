"""One small interface to Hugging Face tokenizers and bare SentencePiece models.

Strings: prompt and candidate are tokenised separately and joined, so the ids of a prompt do not depend
on the text after it. A candidate is tokenised as a continuation, so that no space is inserted or lost
where the two meet: `decode(encode_prompt(p) + encode_completion(c, prompt=p)) == p + c` as far as the
tokenizer's normalisation keeps text.

Conversations: the ids of prompt and candidate together are those of the whole conversation, as the
chat template writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from exo_megatron.data.text import Answer, Chat, Text, TextCodec
from exo_megatron.errors import DataError, reason
from exo_megatron.utils.files import check_regular_files, read_json

GENERATION_CONFIG = "generation_config.json"
_QUESTION, _ANSWER = "question", "answer"


@dataclass(frozen=True)
class EncodedGroup:
    """The ids of a prompt, and of the answers to it."""

    prompt: list[int]
    answers: list[list[int]]


class _Batch:
    """Texts that are encoded together, each of them once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._ids: Sequence[list[int] | DataError] = []

    def put(self, text: str) -> Callable[[], list[int]]:
        """Add a text. Returns the function that gives its ids after `encode`, or raises its DataError."""
        number = self._numbers.setdefault(text, len(self._numbers))

        def ids() -> list[int]:
            found = self._ids[number]
            if isinstance(found, DataError):
                raise found
            return found

        return ids

    def encode(self, path: Path, encode: Callable[[list[str]], list[list[int]]]) -> None:
        """Encode all texts; where the library fails, one by one, so that only those fail that it cannot encode."""
        texts = list(self._numbers)
        try:
            self._ids = encode(texts)
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic of the tokenizers' Rust code is no Exception
            self._ids = [_encode_alone(path, text, encode) for text in texts]


def _encode_alone(path: Path, text: str, encode: Callable[[list[str]], list[list[int]]]) -> list[int] | DataError:
    try:
        return encode([text])[0]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return DataError(
            str(path),
            f"the tokenizer fails ({type(error).__name__}: {reason(error)})",
            expected="a text that it can encode",
            fix="remove the record, or use another tokenizer (data.tokenizer)",
        )


def _result(result: Callable[[], EncodedGroup]) -> EncodedGroup | DataError:
    try:
        return result()
    except DataError as error:
        return error


class Tokenizer:
    """A converter between text and the token ids of one model."""

    def __init__(
        self, path: Path, codec: TextCodec, stops: Iterable[int] = (), embedding_rows: int | None = None
    ) -> None:
        """Wrap a codec for a model with `embedding_rows` (see `fitted_to`), None if unknown.

        `stops` are ids that end a candidate, besides end-of-sequence.
        """
        self.path = path
        self._codec = codec
        self._embedding_rows = embedding_rows
        self.stop_ids = codec.ids.intersection((self.eos_id, *stops))
        entries = max(codec.ids) + 1
        self.vocab_size = entries if embedding_rows is None else min(entries, embedding_rows)
        """The number above all ids that both the tokenizer and, if it is known, its model have."""

    @property
    def absent_ids(self) -> list[int]:
        """Ids of the model that are no token, in order: rows of its embedding that nothing stands for."""
        return sorted(set(range(self._embedding_rows or 0)) - self._codec.ids)

    def fitted_to(self, embedding_rows: int) -> Tokenizer:
        """Return the tokenizer for a model with `embedding_rows` embedding rows.

        Raises DataError if ordinary text, or the end of a sequence, can have ids that the model
        lacks. Added special tokens that it lacks (of images, for example) do no harm unless a text
        holds one; readers of data check this with `vocab_size`.
        """
        entries = max(*(self._codec.ids - self._codec.special_ids), self.eos_id) + 1
        if entries > embedding_rows:
            raise DataError(
                str(self.path),
                f"the tokenizer has {entries} entries, the model {embedding_rows} embedding rows",
                expected="a tokenizer with no more entries than the model's vocabulary",
                fix="use the tokenizer that belongs to the checkpoint (data.tokenizer)",
            )
        return Tokenizer(self.path, self._codec, self.stop_ids, embedding_rows)

    def stopping_at(self, ids: Iterable[int]) -> Tokenizer:
        """Return the tokenizer with more ids that end a candidate."""
        return Tokenizer(self.path, self._codec, self.stop_ids.union(ids), self._embedding_rows)

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token, which ends candidates that nothing else ends."""
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
        return self._with_prefix(prompt, self._codec.encode(self.prompt_text(prompt), continuation=False))

    @property
    def digest(self) -> str:
        """SHA-256 of all that the ids of texts depend on, and of what ends a candidate."""
        parts = [self._codec.description, sorted(self.stop_ids), self._embedding_rows, str(self.path)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts before a text by default: usually the BOS id, or none."""
        return self._codec.prefix_ids

    def encode_batch(self, prompts: Sequence[tuple[Text, Sequence[Answer]]]) -> list[EncodedGroup | DataError]:
        """Return the ids of prompts and of the answers to each, as the two methods for one text do.

        A prompt that cannot be encoded, or has such an answer, gives its error. All texts are encoded
        at once, each of them once.
        """
        starts, continuations = _Batch(), _Batch()
        found: list[Callable[[], EncodedGroup] | DataError] = []
        for prompt, answers in prompts:
            try:
                found.append(self._queue(prompt, answers, starts, continuations))
            except DataError as error:
                found.append(error)
        starts.encode(self.path, partial(self._codec.encode_batch, continuation=False))
        continuations.encode(self.path, partial(self._codec.encode_batch, continuation=True))
        return [each if isinstance(each, DataError) else _result(each) for each in found]

    def _queue(
        self, prompt: Text, answers: Sequence[Answer], starts: _Batch, continuations: _Batch
    ) -> Callable[[], EncodedGroup]:
        """Put the texts of a group into the batches. Returns the function that then gives its ids."""
        before = starts.put(self.prompt_text(prompt))
        queued: list[tuple[Callable[[], list[int]], bool]] = []
        for answer in answers:
            if isinstance(prompt, str) or isinstance(answer, str):
                queued.append((continuations.put(str(answer)), False))
            else:
                whole = self._codec.render(prompt.followed_by(answer), generation_prompt=False)
                queued.append((starts.put(whole), True))

        def result() -> EncodedGroup:
            ids = self._with_prefix(prompt, before())
            return EncodedGroup(
                ids, [self._ended(self._after(ids, read()) if whole else read()) for read, whole in queued]
            )

        return result

    def encode_completion(self, completion: Answer, *, prompt: Text, ended: bool = True) -> list[int]:
        """Return the ids of a candidate of `prompt`, without BOS, up to the token that ends it.

        That is one of `stop_ids`: the one that text or template ends with, else end-of-sequence, which
        is added. If it is not `ended`, the token is left out. Raises DataError as `encode_prompt`, and
        if the ids of the prompt are not the beginning of those of the whole conversation.
        """
        if isinstance(prompt, str) or isinstance(completion, str):
            ids = self._codec.encode(str(completion), continuation=True)
        else:
            whole = self._codec.render(prompt.followed_by(completion), generation_prompt=False)
            ids = self._after(self.encode_prompt(prompt), self._codec.encode(whole, continuation=False))
        ids = self._ended(ids)
        return ids if ended else ids[:-1]

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of ids for a reader, special tokens included."""
        return self._codec.show(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a whole sequence that begins with a prompt, without special tokens."""
        return self._codec.decode(ids, continuation=False)

    def decode_completion(self, ids: Sequence[int]) -> str:
        """Return the text of a candidate, its leading space included, without special tokens."""
        return self._codec.decode(ids, continuation=True)

    def _with_prefix(self, prompt: Text, ids: list[int]) -> list[int]:
        prefix = list(self._codec.prefix_ids)
        return ids if not isinstance(prompt, str) or ids[: len(prefix)] == prefix else prefix + ids

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] in self.stop_ids else [*ids, self.eos_id]

    def _after(self, before: list[int], whole: list[int]) -> list[int]:
        """Return what the template adds to the prompt for the answer, up to the token that ends it.

        Templates write more after the turn's end (a line break, the end of the text), which a model
        never generates.
        """
        if whole[: len(before)] != before:
            raise DataError(
                str(self.path),
                "the answer is no continuation of its prompt: the chat template or the tokenizer writes the end of the "
                f"prompt {self._tail(before)} otherwise where the answer follows "
                f"({self._tail(whole[: len(before)])})",
                expected="a conversation that begins with the prompt as it is rendered for generation",
                fix="remove what the answer begins with (line breaks), correct the template, or give strings",
            )
        return self._up_to_its_end(whole[len(before) :])

    def _up_to_its_end(self, ids: list[int]) -> list[int]:
        """Cut an answer after its last stop token but those that only blanks part from an earlier one."""
        *earlier, end = [place for place, id in enumerate(ids) if id in self.stop_ids] or [len(ids) - 1]
        while earlier and not self._codec.decode(ids[earlier[-1] : end], continuation=True).strip():
            end = earlier.pop()
        return ids[: end + 1]

    def _tail(self, ids: Sequence[int]) -> str:
        return repr("..." + self._codec.decode(ids, continuation=True)[-20:])


def load_tokenizer(
    path: Path, *, chat_template: str | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Load a tokenizer directory or a SentencePiece .model file.

    The directory holds Hugging Face files, or only a tokenizer.model; the stop tokens of its
    generation_config.json end candidates. Only local files are read, and no code from the directory
    is run.

    Args:
        path: the directory or file.
        chat_template: a chat template in place of the tokenizer's own, or the path of a file with one.
        template_kwargs: variables of the chat template.

    Raises:
        DataError: there is no tokenizer, it cannot be read, or has no end-of-sequence token; or
            template or variables cannot be used.
    """
    if path.is_file() and path.suffix == ".model":
        return _load_sentencepiece(path, path, chat_template)
    if not path.is_dir():
        raise DataError(
            str(path), "is not a tokenizer", expected="a tokenizer directory or a .model file", fix="correct the path"
        )
    check_regular_files(path)
    stops = read_generation_stops(path)
    hugging_face = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not hugging_face and (path / "tokenizer.model").is_file():
        return _load_sentencepiece(path, path / "tokenizer.model", chat_template).stopping_at(stops)
    from exo_megatron.data.hf_codec import load_hf_codec

    template = None if chat_template is None else _read_template(chat_template)
    codec = load_hf_codec(path, template, template_kwargs)
    turn_end = find_turn_end(codec) if codec.has_template else []
    return Tokenizer(path, codec, [*stops, *turn_end])


def _load_sentencepiece(path: Path, file: Path, chat_template: str | None) -> Tokenizer:
    from exo_megatron.data.sentencepiece_codec import SentencePieceCodec

    if chat_template is not None:
        raise DataError(
            "data.chat_template",
            f"{file} is a bare SentencePiece model, in whose text special tokens are ordinary text",
            expected="a Hugging Face tokenizer for chat messages",
            fix="remove data.chat_template, or give a tokenizer directory with tokenizer.json (data.tokenizer)",
        )
    return Tokenizer(path, SentencePieceCodec(file))


def _read_template(text_or_file: str) -> str:
    """Return a chat template, from its file if that is what is given."""
    if "{" in text_or_file:
        return text_or_file
    file = Path(text_or_file).expanduser()
    if not file.is_file():
        raise DataError(
            "data.chat_template",
            f"{text_or_file!r} is neither a file nor a template",
            expected="a file with a Jinja template, or the template itself",
            fix="correct the path",
        )
    return file.read_text(encoding="utf-8")


def read_generation_stops(directory: Path) -> list[int]:
    """Return the end-of-sequence ids of a model's generation_config.json, one or several; [] without the file.

    Raises DataError if the file cannot be read or has other values there.
    """
    file = directory / GENERATION_CONFIG
    if not file.is_file():
        return []
    settings = read_json(file)
    stored = settings.get("eos_token_id") if isinstance(settings, dict) else settings
    ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(id) is int for id in ids):
        raise DataError(
            str(file), f"'eos_token_id' is {stored!r}", expected="a token id or a list of them", fix="correct the file"
        )
    return ids


def find_turn_end(codec: TextCodec) -> list[int]:
    """Return the special token that the chat template writes after an answer, if there is one.

    Models that were tuned on the template end their turns with it, whatever their end-of-sequence
    token is.
    """
    messages = ({"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER})
    try:
        rendered = codec.render(Chat(messages), generation_prompt=False)
    except DataError:  # no template, or one that wants other messages
        return []
    _, answer, after = rendered.rpartition(_ANSWER)
    ids = codec.encode(after, continuation=True) if answer else []
    return [id for id in ids[:1] if id in codec.special_ids]
