"""A Hugging Face tokenizer as a text codec."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from exo_megatron.data.text import Chat
from exo_megatron.data.word_memo import WordMemo, word_pattern
from exo_megatron.errors import DataError, reason

EVERYWHERE = frozenset({"role", "content", "tool_call_id"})
"""Fields of messages that need not be named in a template; an identifier of a call says nothing to the model."""

OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "tokenize", "chat_template"})


class HfCodec:
    """A fast tokenizer, and a copy of it that leaves spaces at the beginning of a text alone.

    The copy neither inserts nor strips a space there, so it is used for continuations. Conversations
    are rendered with the tokenizer's chat template and the variables `template_kwargs`.
    """

    def __init__(
        self, path: Path, tokenizer: PreTrainedTokenizerFast, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Use a tokenizer. Raises DataError for variables that its template does not have."""
        self.path = path
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        self._check_template_kwargs()
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description["truncation"] = description["padding"] = None
        without_space = _without_prefix_space(description)
        self._start = _Backend(description)
        self._continuation = self._start if without_space == description else _Backend(without_space)
        parts = [description, tokenizer.chat_template, tokenizer.special_tokens_map, self._template_kwargs]
        self.description = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
        self.ids = frozenset(self._start.tokenizer.get_vocab(with_added_tokens=True).values())
        added = self._start.tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.eos_id = _eos_id(path, tokenizer)
        self.prefix_ids = _default_prefix(tokenizer)

    def encode(self, text: str, *, continuation: bool) -> list[int]:
        """Return the ids of the text.

        Special tokens that are written out in it are recognised, as chat templates need.
        """
        return self._backend(continuation).encode(text)

    def encode_batch(self, texts: Sequence[str], *, continuation: bool) -> list[list[int]]:
        """Return the ids of each of the texts, the same as `encode`, in one thread.

        It is fast where texts have words in common and the tokenizer is known to split texts between them.
        """
        return self._backend(continuation).encode_batch(texts)

    def decode(self, ids: Sequence[int], *, continuation: bool) -> str:
        """Return the text of the ids without special tokens."""
        text: str = self._backend(continuation).tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens included."""
        text: str = self._start.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def render(self, chat: Chat, *, generation_prompt: bool) -> str:
        """Render a conversation with the chat template.

        Raises DataError if there is no template, it refuses the messages, or knows nothing of a field
        that they have.
        """
        self._require_template()
        try:
            return render_chat(
                self._tokenizer, chat, generation_prompt=generation_prompt, variables=self._template_kwargs
            )
        except UnreadFields as error:
            raise DataError(
                str(self.path),
                f"the chat template has no use for {error} of the messages",
                expected="messages all of which the template writes",
                fix="set data.chat_template to one that does, or remove the field from the data",
            ) from None
        # Templates raise exceptions of any type, through jinja2 or transformers.
        except Exception as error:
            raise DataError(
                str(self.path),
                f"the chat template refuses the messages ({reason(error)})",
                expected="messages in the order and with the roles that the template knows",
                fix="correct the messages or the template",
            ) from None

    @property
    def has_template(self) -> bool:
        """True if chats can be rendered."""
        return self._tokenizer.chat_template is not None

    def _require_template(self) -> None:
        if not self.has_template:
            raise DataError(
                str(self.path),
                "the tokenizer has no chat template, and the data has chat messages",
                expected="a chat template, or prompts and completions as strings",
                fix="set data.chat_template, or write the data as strings",
            )

    def _check_template_kwargs(self) -> None:
        for name in self._template_kwargs:
            self._require_template()
            if name in OWN_VARIABLES or not _reads(str(self._tokenizer.get_chat_template()), name):
                raise DataError(
                    f"data.template_kwargs.{name}",
                    f"the chat template of {self.path} has no such variable to set",
                    expected="variables that the template reads, such as enable_thinking",
                    fix="correct the name, or remove it",
                )

    def _backend(self, continuation: bool) -> _Backend:
        return self._continuation if continuation else self._start


# The library would start a thread per core in every process of the node, each of which encodes texts of its own.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class _Backend:
    """A tokenizer of the tokenizers library, with a memo of words where texts may be cut into words."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.tokenizer = BackendTokenizer.from_str(json.dumps(description))
        word = word_pattern(description)
        self._memo = None if word is None else WordMemo(word, self._encode_all)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return self._encode_all(texts) if self._memo is None else self._memo.encode(texts)

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def load_hf_codec(
    path: Path, chat_template: str | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> HfCodec:
    """Load a tokenizer directory with AutoTokenizer, from local files, running none of its code.

    Args:
        path: the directory.
        chat_template: a template in place of the tokenizer's own.
        template_kwargs: variables of the template.

    Raises:
        DataError: the tokenizer cannot be loaded, is no fast tokenizer, or differs from its
            SentencePiece model, or the template does not have the variables.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    # transformers raises many unrelated types for files that it cannot use.
    except Exception as error:
        raise DataError(
            str(path),
            f"transformers cannot load the tokenizer ({reason(error)})",
            expected="tokenizer.json, or tokenizer.model, with tokenizer_config.json",
            fix="save the tokenizer with save_pretrained, or give the SentencePiece .model file itself",
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            str(path),
            f"{type(tokenizer).__name__} is not backed by the tokenizers library",
            expected="a tokenizer with tokenizer.json",
            fix="convert it to a fast tokenizer and save it with save_pretrained",
        )
    if not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file():
        _check_conversion(path, tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return HfCodec(path, tokenizer, template_kwargs)


class UnreadFields(Exception):
    """The fields of a conversation that its chat template never reads, in quotes."""


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    *,
    generation_prompt: bool,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with the tokenizer's chat template: of several, the one for tools where there are tools.

    Raises UnreadFields, and whatever transformers or the template raises.
    """
    tools: list[Any] | None = [dict(tool) for tool in chat.tools] or None
    template = str(tokenizer.get_chat_template(tools=tools))
    fields = {name for message in chat.messages for name in message} - EVERYWHERE
    unread = [name for name in sorted(fields | ({"tools"} if tools else set())) if not _reads(template, name)]
    if unread:
        raise UnreadFields(", ".join(map(repr, unread)))
    messages = [dict(message) for message in chat.messages]
    text = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=generation_prompt, tokenize=False, **(variables or {})
    )
    return str(text)


def _reads(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _eos_id(path: Path, tokenizer: PreTrainedTokenizerFast) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            str(path),
            "the tokenizer has no end-of-sequence token",
            expected="eos_token in tokenizer_config.json",
            fix="name the token that ends a text there",
        )
    return int(tokenizer.eos_token_id)


def _default_prefix(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text by default.

    Ids that it puts after a text do not belong in a prompt.
    """
    around = ids_around(*(tokenizer.encode("a", add_special_tokens=add) for add in (False, True)))
    return () if around is None else tuple(around[0])


def ids_around(plain: list[int], full: list[int]) -> tuple[list[int], list[int]] | None:
    """Return the ids before and after `plain` in `full`; None if it is not in there."""
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return None


def _check_conversion(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise DataError if the tokenizer differs from the SentencePiece model it was made from.

    transformers 5 builds `LlamaTokenizer` as BPE for every model. With a unigram model the result
    splits texts into characters, without a warning.
    """
    original = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    size = original.get_piece_size()
    for start in range(64):
        pieces = original.decode([i for i in range(start, size, 64) if _is_text(original, i)][:32])
        # SentencePiece may drop extra spaces, on which the two may then differ.
        text = " ".join(pieces.split())
        if original.encode(text) != tokenizer.encode(text, add_special_tokens=False):
            raise DataError(
                str(path),
                f"transformers' {type(tokenizer).__name__} gives other ids than tokenizer.model itself for {text!r}",
                expected="a tokenizer class that fits the SentencePiece model (LlamaTokenizer needs a BPE model)",
                fix="remove tokenizer_config.json to use tokenizer.model itself, or add the right tokenizer.json",
            )


def _is_text(model: SentencePieceProcessor, piece: int) -> bool:
    return not (model.is_control(piece) or model.is_unknown(piece) or model.is_byte(piece) or model.is_unused(piece))


def _without_prefix_space(node: Any) -> Any:
    """Change a tokenizer.json tree so that it leaves the beginning of a text alone.

    This concerns its normaliser, its pre-tokeniser and its decoder.
    """
    if isinstance(node, list):
        kept = [_without_prefix_space(item) for item in node]
        return [item for item in kept if not _touches_beginning(item)]
    if not isinstance(node, dict):
        return node
    changed = {
        name: value if name in ("model", "added_tokens") else _without_prefix_space(value)
        for name, value in node.items()
    }
    if changed.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if changed.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    for part in ("normalizer", "decoder"):
        if part in changed and _touches_beginning(changed[part]):
            changed[part] = None
    return changed


def _touches_beginning(node: Any) -> bool:
    """Tell whether a node prepends a space (U+2581) to a text, or strips it again when decoding."""
    if not isinstance(node, dict):
        return False
    kind = node.get("type")
    return kind == "Prepend" or (kind == "Strip" and node.get("start") == 1 and "content" in node)
