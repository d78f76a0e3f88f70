"""Rewards from a sequence classifier on disk, against transformers called by hand on one text at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from exo_megatron.config.sections import RewardConfig
from exo_megatron.data.text import Chat
from exo_megatron.errors import RewardError
from exo_megatron.rewards.build import build_reward
from exo_megatron.rewards.classifier import logits_to_rewards
from exo_megatron.rewards.source import Completion, SampledIds
from tests.reference.classifiers import chat_tokenizer, save_classifier
from tests.reference.completions import completions
from tests.reference.tiny_llama import tiny_tokenizer, word

PROMPTS = [f"{word(5)} {word(6)}", word(7), f"{word(8)} {word(9)} {word(10)}"]
TEXTS = [f" {word(11)}", f" {word(12)} {word(13)} {word(14)} {word(15)}", f" {word(5)}"]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def build(directory: Path, told: list[str] | None = None, **config: Any) -> Any:
    config = {"kind": "hf_classifier", "path": directory, **config}
    return build_reward(RewardConfig(**config), torch.device("cpu"), [].append if told is None else told.append)


def by_hand(directory: Path, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The logits of each text alone, so that there is no padding."""
    model = AutoModelForSequenceClassification.from_pretrained(str(directory)).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in texts]


def chat(answer: str, tools: Sequence[Any] = (), **further: Any) -> Completion:
    given = Chat((*CHAT, {"role": "assistant", "content": answer}), tuple(tools))
    return Completion("record 'x', candidate 0", "the policy's <|x|> text", answer, given, **further)


def ids_of(directory: Path) -> list[list[int]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
    return [tokenizer(p + t)["input_ids"] for p, t in zip(PROMPTS, TEXTS, strict=True)]


# Padding


@pytest.mark.parametrize(
    ("kind", "padding"),
    [
        (kind, padding)
        for kind in ("llama", "qwen2", "gpt2", "bert", "roberta")
        for padding in ("<|pad|>", "<|eot_id|>", None)
        if (kind, padding) != ("roberta", None)  # it counts its positions from that of the padding token
    ],
)
def test_padding_changes_no_score(tmp_path: Path, kind: str, padding: str | None) -> None:
    """Texts end in the padding token, in that of the end of a sequence, or in neither."""
    tokenizer = chat_tokenizer()
    pad_token_id = None if padding is None else tokenizer.convert_tokens_to_ids(padding)
    save_classifier(tmp_path, kind, tokenizer, positions=512, pad_token_id=pad_token_id)
    # The last texts end in ids with which a batch before them may have been padded, at loading (8) or later (0).
    ends = ["", "<|eot_id|>", "<|pad|>", "<|eot_id|><|eot_id|>", "<|pad|><|eot_id|>", "!", ")"]
    assert tokenizer("!)", add_special_tokens=False)["input_ids"] == [0, 8]
    texts = ["hello" + " world" * (7 * n % 5) + "how are you"[: 3 * n] + end for n, end in enumerate(ends)]
    expected = [row[0] for row in by_hand(tmp_path, [tokenizer(text)["input_ids"] for text in texts])]
    assert max(expected) - min(expected) > 0.02
    told: list[str] = []
    for batch_size in (1, 2, 7):
        rewards = build(tmp_path, told, batch_size=batch_size).score(completions(texts, [""] * len(texts)))
        assert rewards == pytest.approx(expected, abs=1e-5)
    assert told == []


def test_a_model_that_reads_its_last_position_gets_one_text_at_a_time(tmp_path: Path) -> None:
    """XLNet's tokenizer pads on the left for that reason."""
    save_classifier(tmp_path, "xlnet", tiny_tokenizer(), pad_token_id=0)
    expected = [row[0] for row in by_hand(tmp_path, ids_of(tmp_path))]
    told: list[str] = []
    assert build(tmp_path, told).score(completions(PROMPTS, TEXTS)) == pytest.approx(expected, abs=1e-5)
    assert told == [f"reward.path {tmp_path}: padding changes the scores of this model, so it gets one text at a time"]


def test_every_id_in_one_batch_leaves_none_for_padding(tmp_path: Path) -> None:
    save_classifier(tmp_path, "llama", tiny_tokenizer(), pad_token_id=None)
    everything = " ".join(tiny_tokenizer().convert_ids_to_tokens(range(len(tiny_tokenizer()))))
    expected = by_hand(tmp_path, [tiny_tokenizer()(text)["input_ids"] for text in (everything, word(5))])
    rewards = build(tmp_path).score(completions([everything, word(5)], ["", ""]))
    assert rewards == pytest.approx([row[0] for row in expected], abs=1e-5)


# Outputs


@pytest.mark.parametrize("label", [0, 2])
def test_log_odds_of_a_class(tmp_path: Path, label: int) -> None:
    save_classifier(tmp_path, "llama", tiny_tokenizer(), num_labels=3)
    p = torch.tensor(by_hand(tmp_path, ids_of(tmp_path))).double().softmax(dim=1)[:, label]
    rewards = build(tmp_path, label=label, batch_size=2).score(completions(PROMPTS, TEXTS))
    assert rewards == pytest.approx((p / (1 - p)).log().tolist(), abs=1e-4)


def test_log_odds_of_a_certain_class_are_finite() -> None:
    assert logits_to_rewards(torch.tensor([[400.0, 0.0]]), 0).tolist() == [400.0]


@pytest.mark.parametrize(("labels", "label"), [(1, 0), (2, None), (2, 2)])
def test_label_that_does_not_fit(tmp_path: Path, labels: int, label: int | None) -> None:
    save_classifier(tmp_path, "llama", tiny_tokenizer(), num_labels=labels)
    with pytest.raises(RewardError, match=f"{labels} outputs? and reward.label is {label}"):
        build(tmp_path, label=label)


# Conversations


def test_a_conversation_is_what_the_classifiers_own_template_writes(tmp_path: Path) -> None:
    """One BOS, though template and tokenizer both write it; the end of the turn; nothing of the policy's text."""
    tokenizer = chat_tokenizer()
    save_classifier(tmp_path, "llama", tokenizer)
    answers = ["hello world", " the answer is forty two. ", ""]
    written = [
        tokenizer.apply_chat_template(
            [*CHAT, {"role": "assistant", "content": answer}], tokenize=True, return_dict=False
        )
        for answer in answers
    ]
    assert [ids.count(tokenizer.bos_token_id) for ids in written] == [1, 1, 1]
    assert {ids[-1] for ids in written} == {tokenizer.eos_token_id}
    expected = [row[0] for row in by_hand(tmp_path, written)]
    told: list[str] = []
    assert build(tmp_path, told).score([chat(answer) for answer in answers]) == pytest.approx(expected, abs=1e-5)
    assert told == []


def test_ids_as_sampled_where_policy_and_classifier_share_tokenizer_and_template(tmp_path: Path) -> None:
    """Drawn ids that the tokenizer would not give for their text, with and without the end of the turn."""
    tokenizer = chat_tokenizer()
    save_classifier(tmp_path, "llama", tokenizer)
    prompt = tuple(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False))
    letters = tuple(tokenizer.convert_tokens_to_ids(list("hello")))
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] != list(letters)
    eot = tokenizer.eos_token_id
    cases = [
        (SampledIds(prompt, (*letters, eot), finished=True), [*prompt, *letters, eot]),
        (SampledIds(prompt, letters, finished=False), [*prompt, *letters, eot]),  # the template ends the turn
        (SampledIds((*prompt[:-1], 7), (*letters, eot), finished=True), None),  # another prompt
        (SampledIds(prompt, (*letters, letters[0]), finished=False), None),  # other ids than the text
        (SampledIds(prompt, (len(tokenizer) + 3,), finished=False), None),  # an id of another tokenizer
    ]
    again = tokenizer.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": "hello"}], tokenize=True, return_dict=False
    )
    expected = by_hand(tmp_path, [again if ids is None else ids for _, ids in cases])
    rewards = build(tmp_path).score([chat("hello", sampled=sampled) for sampled, _ in cases])
    assert rewards == pytest.approx([row[0] for row in expected], abs=1e-5)


def test_tools_of_a_record_reach_the_template(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools else 'none' }}" + tokenizer.chat_template
    save_classifier(tmp_path, "llama", tokenizer)
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [*CHAT, {"role": "assistant", "content": "hi"}]
    written = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    expected = by_hand(tmp_path, [written])[0]
    assert build(tmp_path).score([chat("hi", tools)]) == pytest.approx(expected, abs=1e-5)


def test_what_the_template_would_drop_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, "llama", chat_tokenizer())
    with pytest.raises(
        RewardError, match=r"record 'x', candidate 0: the chat template .* has no use for their 'tools'"
    ):
        build(tmp_path).score([chat("hi", [{"type": "function"}])])


def test_a_template_that_refuses_the_messages(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    save_classifier(tmp_path, "llama", tokenizer)
    with pytest.raises(RewardError, match=r"record 'x', candidate 0: the chat template .* refuses .*no system"):
        build(tmp_path).score([chat("hi")])


def test_conversations_without_a_template_are_plain_text_and_it_is_said_once(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    save_classifier(tmp_path, "llama", tokenizer)
    text = "system: be brief\n\nuser: hello\n\nassistant: hi"
    expected = by_hand(tmp_path, [tokenizer(text)["input_ids"]])[0]
    told: list[str] = []
    source = build(tmp_path, told)
    assert source.score([chat("hi")]) + source.score([chat("hi")]) == pytest.approx(expected * 2, abs=1e-5)
    assert len(told) == 1
    assert "has no chat template; conversations are scored as plain text" in told[0]


@pytest.mark.parametrize("begin", ["", "<|begin_of_text|>"])
def test_text_gets_the_special_tokens_of_the_tokenizer_once(tmp_path: Path, begin: str) -> None:
    tokenizer = chat_tokenizer()
    save_classifier(tmp_path, "llama", tokenizer)
    ids = tokenizer("hello world")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    rewards = build(tmp_path).score(completions([f"{begin}hello"], [" world"]))
    assert rewards == pytest.approx(by_hand(tmp_path, [ids])[0], abs=1e-5)


def test_special_tokens_on_both_sides(tmp_path: Path) -> None:
    """In the manner of BERT, also where the text brings one of them."""
    tokenizer = tiny_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    save_classifier(tmp_path, "bert", tokenizer)
    expected = by_hand(tmp_path, [[1, 7, 2]])[0] * 4
    given = [word(7), f"<s> {word(7)}", f"{word(7)} </s>", f"<s> {word(7)} </s>"]
    assert build(tmp_path).score(completions(given, [""] * 4)) == pytest.approx(expected, abs=1e-5)


# Lengths


@pytest.mark.parametrize(
    ("kind", "tokenizer_limit", "limit"),
    [("llama", None, 16), ("gpt2", None, 16), ("bert", None, 16), ("roberta", None, 14), ("bloom", None, None),
     ("gpt2", 9, 9), ("bloom", 9, 9)],
)  # fmt: skip
def test_the_longest_text_of_any_configuration(
    tmp_path: Path, kind: str, tokenizer_limit: int | None, limit: int | None
) -> None:
    """RoBERTa's positions begin behind that of the padding token, 1 here."""
    tokenizer = tiny_tokenizer()
    if tokenizer_limit is not None:
        tokenizer.model_max_length = tokenizer_limit
    save_classifier(tmp_path, kind, tokenizer, positions=16, pad_token_id=1 if kind == "roberta" else None)
    source = build(tmp_path)
    longest = " ".join(word(5 + n) for n in range(limit or 40))
    source.score(completions([longest], [""]))
    if limit is not None:
        with pytest.raises(RewardError, match=rf"record 'r0', candidate 0: has {limit + 1} tokens .* at most {limit},"):
            source.score(completions([longest], [f" {word(5)}"]))


def test_truncation_that_a_tokenizer_file_asks_for_is_not_done(tmp_path: Path) -> None:
    save_classifier(tmp_path, "llama", tiny_tokenizer())
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text())
    description["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(description))
    ids = [list(map(int, (p + t).replace("w", "").split())) for p, t in zip(PROMPTS, TEXTS, strict=True)]
    expected = [row[0] for row in by_hand(tmp_path, ids)]
    assert build(tmp_path).score(completions(PROMPTS, TEXTS)) == pytest.approx(expected, abs=1e-5)


# Files


@pytest.mark.parametrize("lost", ["score.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_in_the_file(tmp_path: Path, lost: str) -> None:
    save_classifier(tmp_path, "llama", tiny_tokenizer())
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=f"its files lack {lost} of LlamaForSequenceClassification"):
        build(tmp_path)


def test_weights_without_use_are_told(tmp_path: Path) -> None:
    save_classifier(tmp_path, "llama", tiny_tokenizer())
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"score.bias": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told: list[str] = []
    build(tmp_path, told)
    assert len(told) == 1
    assert "has no use for score.bias of the weights" in told[0]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, "llama", tiny_tokenizer())
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RewardError, match=r"pickled \.bin is refused"):
        build(tmp_path)


def test_code_in_the_directory_is_not_run(tmp_path: Path) -> None:
    save_classifier(tmp_path, "llama", tiny_tokenizer())
    config = tmp_path / "config.json"
    text = config.read_text().replace('"model_type": "llama"', '"model_type": "mine"')
    config.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "evil.Config"},', 1))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(RewardError, match="transformers cannot load it"):
        build(tmp_path)
    assert not (tmp_path / "ran").exists()
