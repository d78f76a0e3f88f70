"""The token ids that a sequence classifier reads: a conversation in its own chat template, or a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from exo_megatron.data.completions import transcript
from exo_megatron.data.hf_codec import UnreadFields, ids_around, render_chat
from exo_megatron.data.text import Chat
from exo_megatron.errors import RewardError, reason
from exo_megatron.rewards.source import Completion


class ClassifierInput:
    """A converter of completions to the ids of a classifier's own tokenizer. It never shortens one.

    `tell` gets a line if there are conversations and the tokenizer has no chat template. Raises
    RewardError for a tokenizer that it cannot serve.
    """

    def __init__(self, tokenizer: Any, where: str, tell: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._where = where
        self._tell = tell
        self._told = False
        self._before, self._after = _special_ids(tokenizer, where)

    def probe(self, length: int) -> list[int]:
        """Return `length` different ordinary ids between the tokenizer's special ones."""
        special = set(self._tokenizer.all_special_ids)
        ordinary = (id for id in range(len(self._tokenizer)) if id not in special)
        return [*self._before, *islice(ordinary, length), *self._after]

    def ids(self, completion: Completion) -> list[int]:
        """Return the ids of a conversation, or of prompt + candidate where there are no messages.

        Raises RewardError if the chat template refuses the messages.
        """
        chat = completion.chat
        if chat is None:
            return self._text_ids(completion.prompt + completion.text)
        if self._tokenizer.chat_template is None:
            self._tell_once()
            return self._text_ids(transcript(chat.messages))
        rendered = self._render(completion, chat, generation_prompt=False)
        sampled = self._sampled_ids(completion, chat, rendered)
        return self._plain_ids(rendered) if sampled is None else sampled

    def _tell_once(self) -> None:
        if not self._told:
            self._told = True
            self._tell(
                f"{self._where}: the classifier's tokenizer has no chat template; conversations are scored as plain "
                "text, `role: content` with blank lines between the messages"
            )

    def _sampled_ids(self, completion: Completion, chat: Chat, rendered: str) -> list[int] | None:
        """Return the conversation with the very ids that the policy drew, if they mean the same here.

        They do where policy and classifier share tokenizer and template: the prompt has the same
        ids, and the candidate's ids are its text, which the template writes unchanged. Encoding the
        text again would give other ids wherever the draw was not the tokenizer's own splitting.
        """
        drawn = completion.sampled
        if drawn is None or max(drawn.candidate) >= len(self._tokenizer):
            return None
        prompt = self._render(completion, Chat(chat.messages[:-1], chat.tools), generation_prompt=True)
        written = prompt + completion.text
        if not rendered.startswith(written) or tuple(self._plain_ids(prompt)) != drawn.prompt:
            return None
        if self._decode(drawn.prompt + drawn.candidate) != self._decode(drawn.prompt) + completion.text:
            return None
        candidate = list(drawn.candidate)
        if drawn.finished and self._decode(candidate[-1:]) == "":
            candidate.pop()  # the token at which the policy stopped, which the template writes itself
        return [*drawn.prompt, *candidate, *self._plain_ids(rendered[len(written) :])]

    def _render(self, completion: Completion, chat: Chat, *, generation_prompt: bool) -> str:
        try:
            return render_chat(self._tokenizer, chat, generation_prompt=generation_prompt)
        except UnreadFields as error:
            raise self._refused(completion, f"has no use for their {error}") from None
        # Templates raise exceptions of any type, through jinja2 or transformers.
        except Exception as error:
            raise self._refused(completion, f"refuses the messages ({reason(error)})") from None

    def _refused(self, completion: Completion, problem: str) -> RewardError:
        return RewardError(
            completion.where,
            f"the chat template of {self._where} {problem}",
            expected="messages that the classifier's template knows, in their order, with their roles and fields",
            fix="correct the messages, or the template of the classifier",
        )

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids of a text with the tokenizer's special tokens around it, once.

        Those that are written out in the text are not added again.
        """
        ids = self._plain_ids(text)
        before = [] if ids[: len(self._before)] == self._before else self._before
        after = [] if self._after and ids[-len(self._after) :] == self._after else self._after
        return [*before, *ids, *after]

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _special_ids(tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text by default.

    Raises RewardError for a tokenizer whose other inputs (segments, as of XLNet) are not the
    model's defaults.
    """
    plain, full = (tokenizer("a", add_special_tokens=add, truncation=False) for add in (False, True))
    around = ids_around(plain["input_ids"], full["input_ids"])
    if around is None or any(full.get("token_type_ids", ())):
        raise RewardError(
            where,
            f"its tokenizer {type(tokenizer).__name__} writes special tokens or segments that are not supported",
            expected="special tokens before and after the text, and one segment",
            fix="use another classifier, or call it in a function (reward.kind=function)",
        )
    return around
