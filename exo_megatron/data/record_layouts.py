"""The table of layouts: which columns a record may have, and what they mean in our own fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from exo_megatron.config.losses import kinds_comparing
from exo_megatron.data.conversations import as_messages, separate
from exo_megatron.data.records import Fields, require, wrong_type

Use = Literal["prompts", "sft", "score", "preference", "rewards"]
"""What records are read for: prompts to draw candidates for, or groups of a stage."""

STAGES: Mapping[Use, str] = {
    "prompts": "rollout and evaluate",
    "sft": "sft",
    "score": "score",
    "preference": f"align with loss.kind {kinds_comparing('preference')}",
    "rewards": f"align with loss.kind {kinds_comparing('rewards')}",
}
"""Stages by what they read records for."""

PAIRS: frozenset[Use] = frozenset({"prompts", "sft", "preference"})
ANSWERS: frozenset[Use] = frozenset({"prompts", "sft"})
REWARDED: frozenset[Use] = frozenset({"prompts", "score", "preference", "rewards"})


@dataclass(frozen=True)
class RecordLayout:
    """One line of the table.

    Attributes:
        name: what it is called in messages.
        columns: the columns by which it is recognised; a record has all of them.
        uses: what it can be read for.
        convert: gets the place of a record, its fields, and whether strings become messages. Returns
            "prompt" with "chosen", "rejected" (one answer, or several) or "completions" and "rewards";
            or "messages" or "text" alone. Raises DataError.
        optional: further columns that belong to it.
    """

    name: str
    columns: tuple[str, ...]
    uses: frozenset[Use]
    convert: Callable[[str, Fields, bool], dict[str, Any]]
    optional: tuple[str, ...] = ()

    @property
    def known(self) -> frozenset[str]:
        """All columns that it takes."""
        return frozenset((*self.columns, *self.optional))


def _pair(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    """Convert a chosen answer and one or several rejected ones, with the prompt apart or in them."""
    rejected = require(where, fields, "rejected")
    several = isinstance(rejected, list) and not (rejected and all(isinstance(each, Mapping) for each in rejected))
    if several and not rejected:
        raise wrong_type(where, "rejected", rejected, "at least one answer")
    answers = {"chosen": require(where, fields, "chosen")}
    answers |= {f"rejected[{k}]": each for k, each in enumerate(rejected)} if several else {"rejected": rejected}
    prompt, found = separate(where, fields.get("prompt"), answers, system=fields.get("system"), chat=chat)
    return {"prompt": prompt, "chosen": found[0], "rejected": found[1:] if several else found[1]}


def _answer(name: str) -> Callable[[str, Fields, bool], dict[str, Any]]:
    """Return a conversion of a prompt and the one answer in the column `name`."""

    def convert(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
        answer = {name: require(where, fields, name)}
        prompt, found = separate(where, fields["prompt"], answer, system=fields.get("system"), chat=chat)
        return {"prompt": prompt, "chosen": found[0]}

    return convert


def _prompt(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    return {"prompt": separate(where, fields["prompt"], {}, system=fields.get("system"), chat=chat)[0]}


def _completions(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    """Convert K completions, and their rewards if there are any."""
    completions = require(where, fields, "completions")
    if not isinstance(completions, list) or not completions:
        if "prompt" not in fields:
            raise wrong_type(where, "completions", completions, "a non-empty list of completions")
        return dict(fields)
    answers = {f"completions[{k}]": each for k, each in enumerate(completions)}
    prompt, found = separate(where, fields.get("prompt"), answers, system=fields.get("system"), chat=chat)
    rewards = {"rewards": fields["rewards"]} if "rewards" in fields else {}
    return {"prompt": prompt, "completions": found, **rewards}


def _messages(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    """Convert a whole conversation: a list of messages, and a system message apart if there is one."""
    messages = as_messages(where, "messages", fields["messages"])
    if messages is None:
        raise wrong_type(where, "messages", fields["messages"], "a non-empty list of chat messages")
    return {"messages": separate(where, messages, {}, system=fields.get("system"), chat=chat)[0]}


def _text(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    return {"text": fields["text"]}


def _stored(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    return dict(fields)


ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""Prompt of Stanford's Alpaca (tatsu-lab/stanford_alpaca), as its column "text" has it."""


def _alpaca(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    """Convert an instruction and its answer: Alpaca's own prompt, or a message of the user."""
    instruction, extra = (_string(where, {"input": "", **fields}, name) for name in ("instruction", "input"))
    if chat:
        prompt = f"{instruction}\n\n{extra}" if extra else instruction
    else:
        paired = ", paired with an input that provides further context" if extra else ""
        given = f"### Input:\n{extra}\n\n" if extra else ""
        prompt = ALPACA.format(paired=paired, instruction=instruction, input=given)
    answer = {"output": require(where, fields, "output")}
    prompt_found, found = separate(where, prompt, answer, system=fields.get("system"), chat=chat)
    return {"prompt": prompt_found, "chosen": found[0]}


def _ranked(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    """Convert answers with ranks (Nectar): the best is chosen, all others are rejected."""
    answers = fields["answers"]
    if (
        not isinstance(answers, list)
        or len(answers) < 2
        or not all(
            isinstance(each, Mapping)
            and isinstance(each.get("answer"), str)
            and isinstance(each.get("rank"), int | float)
            for each in answers
        )
    ):
        raise wrong_type(where, "answers", answers, 'at least two objects {"answer": string, "rank": number}')
    ordered = sorted(answers, key=lambda each: float(each["rank"]))
    if ordered[0]["rank"] == ordered[1]["rank"]:
        raise wrong_type(where, "answers", [each["rank"] for each in ordered], "one answer with the best rank")
    texts = {f"answers[{k}]": each["answer"] for k, each in enumerate(ordered)}
    prompt, found = separate(where, fields["prompt"], texts, system=None, chat=chat)
    return {"prompt": prompt, "chosen": found[0], "rejected": found[1:]}


def _summaries(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    """Convert a Reddit post with two summaries (openai/summarize_from_feedback) and OpenAI's prompt."""
    info, summaries = fields["info"], fields["summaries"]
    if not isinstance(info, Mapping) or not all(
        isinstance(info.get(key), str) for key in ("subreddit", "title", "post")
    ):
        raise wrong_type(where, "info", info, "an object with subreddit, title and post")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise wrong_type(where, "summaries", summaries, 'two objects {"text": string}')
    prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    best = _choice(where, fields, "choice")
    return _pair(
        where,
        {"prompt": prompt, "chosen": summaries[best].get("text"), "rejected": summaries[1 - best].get("text")},
        chat,
    )


def _human_refs(where: str, fields: Fields, chat: bool) -> dict[str, Any]:
    """Convert two comments under a post (stanfordnlp/SHP), of which label 1 prefers A."""
    chosen, rejected = (
        ("human_ref_A", "human_ref_B") if _choice(where, fields, "labels") else ("human_ref_B", "human_ref_A")
    )
    return _pair(where, {"prompt": fields["history"], "chosen": fields[chosen], "rejected": fields[rejected]}, chat)


def _choice(where: str, fields: Fields, name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or value not in (0, 1, "0", "1"):
        raise wrong_type(where, name, value, "0 or 1")
    return int(value)


def _string(where: str, fields: Fields, name: str) -> str:
    value = require(where, fields, name)
    if not isinstance(value, str):
        raise wrong_type(where, name, value, "a string")
    return value


def _as(
    convert: Callable[[str, Fields, bool], dict[str, Any]], **names: str
) -> Callable[[str, Fields, bool], dict[str, Any]]:
    """Return the conversion for columns with other names: ours by theirs."""
    return lambda where, fields, chat: convert(where, {names.get(key, key): each for key, each in fields.items()}, chat)


STORED = RecordLayout(
    "stored candidates", ("candidates",), REWARDED, _stored, ("prompt", "prompt_ids", "rewards", "logprob_source")
)

LAYOUTS = (
    RecordLayout("preference pair", ("prompt", "chosen", "rejected"), PAIRS, _pair, ("system",)),
    RecordLayout("preference pair of whole conversations", ("chosen", "rejected"), PAIRS, _pair, ("system",)),
    RecordLayout(
        "question with a preference pair",
        ("question", "chosen", "rejected"),
        PAIRS,
        _as(_pair, question="prompt"),
        ("system",),
    ),
    RecordLayout(
        "conversation with a preference pair",
        ("conversations", "chosen", "rejected"),
        PAIRS,
        _as(_pair, conversations="prompt"),
        ("system",),
    ),
    RecordLayout("ranked answers", ("prompt", "answers"), PAIRS, _ranked),
    RecordLayout("compared summaries", ("info", "summaries", "choice"), PAIRS, _summaries),
    RecordLayout("compared comments", ("history", "human_ref_A", "human_ref_B", "labels"), PAIRS, _human_refs),
    RecordLayout("rewarded completions", ("prompt", "completions", "rewards"), REWARDED, _completions, ("system",)),
    RecordLayout(
        "scored responses",
        ("prompt", "responses", "scores"),
        REWARDED,
        _as(_completions, responses="completions", scores="rewards"),
        ("system",),
    ),
    RecordLayout("rewarded whole conversations", ("completions", "rewards"), REWARDED, _completions, ("system",)),
    RecordLayout("completions", ("prompt", "completions"), frozenset({"prompts", "score"}), _completions, ("system",)),
    RecordLayout(
        "responses",
        ("prompt", "responses"),
        frozenset({"prompts", "score"}),
        _as(_completions, responses="completions"),
        ("system",),
    ),
    RecordLayout("prompt and chosen answer", ("prompt", "chosen"), ANSWERS, _answer("chosen"), ("system",)),
    RecordLayout("prompt and completion", ("prompt", "completion"), ANSWERS, _answer("completion"), ("system",)),
    RecordLayout("messages", ("messages",), ANSWERS, _messages, ("system",)),
    RecordLayout(
        "ShareGPT conversation", ("conversations",), ANSWERS, _as(_messages, conversations="messages"), ("system",)
    ),
    RecordLayout("Alpaca instruction", ("instruction", "output"), ANSWERS, _alpaca, ("input", "text", "system")),
    RecordLayout("text", ("text",), frozenset({"sft"}), _text),
    RecordLayout("prompt", ("prompt",), frozenset({"prompts"}), _prompt, ("system",)),
)
"""The table. docs/data.md has an example of each."""

KNOWN = frozenset().union(*(layout.known for layout in (STORED, *LAYOUTS)))
"""All columns that some layout takes."""
