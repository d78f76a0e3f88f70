"""Conversations: the ids are those that transformers gives for the whole of them, up to what ends the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exo_megatron.config.sections import DataConfig
from exo_megatron.data.dataset import load_groups, load_prompts
from exo_megatron.data.text import Answer, Chat, Message
from exo_megatron.data.tokenizer import load_tokenizer
from exo_megatron.errors import DataError
from exo_megatron.utils.files import write_jsonl

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Style:
    """How a family of chat models writes: its template, what ends a turn, and what its template knows."""

    template: str
    end: str
    special: tuple[str, ...]
    eos: str = "</s>"
    system: bool = True
    tools: bool = False


STYLES = {
    style.template: style
    for style in (
        Style(
            "llama3",
            "<|eot_id|>",
            ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
            eos="<|eot_id|>",
            tools=True,
        ),
        Style("llama2", "</s>", ()),
        Style("gemma", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), eos="<eos>", system=False),
        Style("chatml_tools", "<|im_end|>", ("<|im_start|>", "<|im_end|>"), eos="<|endoftext|>", tools=True),
        Style("thinking", "<|im_end|>", ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
        Style(
            "mistral",
            "</s>",
            (
                "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]",
            ),
            system=False,
            tools=True,
        ),
        Style("phi3", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>"),
        Style("zephyr", "</s>", ()),
        Style("deepseek", "<|end_of_sentence|>", (), eos="<|end_of_sentence|>"),
    )
}  # fmt: skip


def make_tokenizer(style: Style, directory: Path) -> Path:
    """A byte-level BPE of a few merges with the family's special tokens; text gets BOS in front, as in Llama 3."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(["hello world, how are you today? the answer is forty two. user assistant"], trainer)
    backend.add_special_tokens(list(dict.fromkeys(["<s>", style.eos, *style.special])))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=style.eos)
    tokenizer.chat_template = (TEMPLATES / f"{style.template}.jinja").read_text()
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    return {name: make_tokenizer(style, root / name) for name, style in STYLES.items()}


def said(role: str, content: str | None, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
ASKED = (said("user", "how are you?"), said("assistant", "the answer is 42."), said("user", "  and\ttoday? é "))
WEATHER = (said("user", "weather?"), said("assistant", None, tool_calls=[CALL]), said("tool", "18 C", tool_call_id="a"))


def conversations(style: Style) -> list[tuple[Chat, tuple[Message, ...]]]:
    answer = (said("assistant", "It is forty two.\n\nhello"),)
    found = [(Chat(ASKED[:1]), answer), (Chat(ASKED), answer)]
    if style.system:
        found.append((Chat((said("system", "Be brief."), *ASKED)), answer))
    if style.tools:
        found.append((Chat(ASKED, (TOOL,)), answer))
        found.append((Chat(WEATHER, (TOOL, TOOL)), answer))
        found.append((Chat(ASKED[:1]), (*WEATHER[1:], *answer)))
        found.append((Chat(ASKED[:1]), WEATHER[1:2]))
    return found


@pytest.mark.parametrize("name", STYLES)
def test_ids_are_those_of_the_whole_conversation(directories: dict[str, Path], name: str) -> None:
    style, ours = STYLES[name], load_tokenizer(directories[name])
    theirs = AutoTokenizer.from_pretrained(str(directories[name]))
    end = theirs.convert_tokens_to_ids(style.end)
    for prompt, answer in conversations(style):
        messages, tools = [dict(each) for each in (*prompt.messages, *answer)], [dict(tool) for tool in prompt.tools]
        whole = theirs.apply_chat_template(messages, tools=tools or None, tokenize=True, return_dict=False)
        head = theirs.apply_chat_template(
            messages[: len(prompt.messages)],
            tools=tools or None,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=True,
        )
        found = ours.encode_prompt(prompt)
        assert found == head and found.count(theirs.bos_token_id) <= 1 + len(prompt.messages)
        found += ours.encode_completion(answer, prompt=prompt)
        if "tool_calls" in answer[-1] and name == "llama3":
            end_of_call = theirs.convert_tokens_to_ids("<|eom_id|>")
            assert found == [*whole[: len(found) - 1], ours.eos_id] and whole[len(found) - 2] == end_of_call
        else:
            assert found == whole[: len(found)] and found[-1] == end
            assert end not in whole[len(found) :] and len(whole) - len(found) <= 3


@pytest.mark.parametrize("name", STYLES)
def test_what_ends_a_turn_ends_a_candidate(directories: dict[str, Path], name: str) -> None:
    ours, theirs = load_tokenizer(directories[name]), AutoTokenizer.from_pretrained(str(directories[name]))
    assert ours.stop_ids == {theirs.convert_tokens_to_ids(STYLES[name].end), theirs.eos_token_id}


def test_stop_tokens_of_the_generation_config(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = make_tokenizer(STYLES["llama3"], tmp_path / "llama3")
    plain = load_tokenizer(directory)
    end_of_call = AutoTokenizer.from_pretrained(str(directory)).convert_tokens_to_ids("<|eom_id|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [plain.eos_id, end_of_call, 99999]}))
    stopping = load_tokenizer(directory)
    assert stopping.stop_ids == plain.stop_ids | {end_of_call}
    # A call then ends as the template ends it, and a text that ends with it gets no other end.
    prompt = Chat(ASKED[:1])
    assert stopping.encode_completion(WEATHER[1:2], prompt=prompt)[-1] == end_of_call
    assert stopping.encode_completion("well<|eom_id|>", prompt="x").count(end_of_call) == 1
    assert stopping.encode_completion("well<|eom_id|>", prompt="x")[-1] == end_of_call
    assert plain.encode_completion("well<|eom_id|>", prompt="x")[-2:] == [end_of_call, plain.eos_id]
    assert stopping.fitted_to(400).stopping_at([7]).stop_ids == stopping.stop_ids | {7}
    (directory / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(DataError, match=r"generation_config.json: 'eos_token_id' is '</s>'"):
        load_tokenizer(directory)


def test_absent_ids(directories: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(directories["zephyr"])
    size = tokenizer.vocab_size
    assert tokenizer.fitted_to(size).absent_ids == []
    assert tokenizer.fitted_to(size + 3).absent_ids == [size, size + 1, size + 2]


def test_template_and_its_variables(directories: dict[str, Path]) -> None:
    directory, prompt = directories["thinking"], Chat(ASKED[:1])
    answer: Answer = (said("assistant", "well"),)
    theirs = AutoTokenizer.from_pretrained(str(directory))
    ours = load_tokenizer(directory, template_kwargs={"enable_thinking": False})
    whole = theirs.apply_chat_template(
        [*prompt.messages, *answer], tokenize=True, return_dict=False, enable_thinking=False
    )
    head = ours.encode_prompt(prompt)
    assert "</think>" in ours.decode(head) and "</think>" not in load_tokenizer(directory).prompt_text(prompt)
    assert head + ours.encode_completion(answer, prompt=prompt) == whole[:-1]
    for kwargs in ({"enable_thinkin": False}, {"messages": []}):
        with pytest.raises(DataError, match=rf"data.template_kwargs.{next(iter(kwargs))}: .* has no such variable"):
            load_tokenizer(directory, template_kwargs=kwargs)
    for template in ("{{ messages[0].content }}!", str(TEMPLATES / "zephyr.jinja")):
        text = load_tokenizer(directory, chat_template=template).prompt_text(prompt)
        assert text in ("how are you?!", "<|user|>\nhow are you?<|im_end|>\n<|assistant|>\n")
    with pytest.raises(DataError, match=r"data.chat_template: 'none.jinja' is neither a file nor a template"):
        load_tokenizer(directory, chat_template="none.jinja")


def test_what_a_template_cannot_use_is_refused(directories: dict[str, Path]) -> None:
    zephyr = load_tokenizer(directories["zephyr"])
    with pytest.raises(DataError, match="has no use for 'tools'"):
        zephyr.encode_prompt(Chat(ASKED, (TOOL,)))
    with pytest.raises(DataError, match="has no use for 'tool_calls'"):
        zephyr.encode_completion(WEATHER[1:2], prompt=Chat(ASKED[:1]))
    with pytest.raises(DataError, match="has no use for 'name', 'reasoning_content'"):
        zephyr.encode_prompt(Chat((said("user", "x", name="y", reasoning_content="z"),)))


def test_an_answer_that_the_tokenizer_joins_to_its_prompt_is_refused(tmp_path: Path) -> None:
    """The prompt ends in a line break; with one more the tokenizer has a token for both."""
    directory = make_tokenizer(STYLES["zephyr"], tmp_path)
    stored = json.loads((directory / "tokenizer.json").read_text())
    stored["model"]["merges"].append(["\u010a", "\u010a"])
    stored["model"]["vocab"]["\u010a\u010a"] = 400
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(directory)
    with pytest.raises(DataError, match="the answer is no continuation of its prompt"):
        tokenizer.encode_completion((said("assistant", "\n\nwell"),), prompt=Chat(ASKED[:1]))
    assert tokenizer.encode_completion((said("assistant", "well"),), prompt=Chat(ASKED[:1]))


def test_records_with_tools(directories: dict[str, Path], tmp_path: Path) -> None:
    """The column `tools`, as a list or as its JSON text, reaches the template; nulls of columnar files do not."""
    tokenizer = load_tokenizer(directories["chatml_tools"])
    prompt = [{**message, "tool_calls": message.get("tool_calls")} for message in WEATHER]
    pair = {"prompt": prompt, "chosen": [said("assistant", "18 C")], "rejected": [said("assistant", "no", name=None)]}
    file = tmp_path / "d.jsonl"
    write_jsonl(file, [{**pair, "tools": tools} for tools in ([TOOL], json.dumps([TOOL]), [])])
    first, second, without = load_groups(DataConfig(path=str(file)), tokenizer, purpose="preference")
    assert first.prompt == second.prompt == tuple(tokenizer.encode_prompt(Chat(WEATHER, (TOOL,))))
    assert without.prompt == tuple(tokenizer.encode_prompt(Chat(WEATHER)))
    for wrong, message in (
        ({"tools": "x"}, "'tools' is 'x'; expected a list of objects"),
        ({"tools": [TOOL], "prompt": "x", "chosen": "y", "rejected": "z"}, "has 'tools', but 'prompt' is a string"),
        ({"prompt": [said("user", None)]}, r"'prompt\[0\]' is {'role': 'user', 'content': None}"),
        ({"tools": [{"name": "\ud800"}]}, "'tools' has an unpaired surrogate"),
    ):
        file.write_text(json.dumps({**pair, **wrong}))
        with pytest.raises(DataError, match=message):
            load_prompts(DataConfig(path=str(file)), tokenizer)
