"""The formula that users ask for their own lengths and model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MixtralConfig

from exo_megatron.diagnosis.work import Lengths, ModelSize, shared_work
from tools.bench.__main__ import main
from tools.bench.models import words
from tools.bench.predict import predict, read_groups
from tools.bench.work import MODELS, model_size, padded_work, waterfall


def test_work_by_hand() -> None:
    groups = [Lengths(3, (2, 1))]  # texts of 5 and 4 tokens
    plain, *_, stored = waterfall(groups)
    assert (plain.work.tokens, plain.work.pairs, plain.work.projected) == (9, 25 / 2 + 16 / 2, 9)
    # 3 + 2 + 1 tokens; the prompt's last token predicts both first ones, y_1's first token its second.
    assert (stored.work.tokens, stored.work.projected) == (6, 2)
    assert stored.work.pairs == 9 / 2 + (3 * 2 + 4 / 2) + (3 * 1 + 1 / 2)
    assert shared_work(groups, response_only=False).projected == 6
    padded = padded_work([[5, 4], [7]])
    assert (padded.tokens, padded.pairs) == (5 + 5 + 7, (2 * 25 + 49) / 2)
    model = ModelSize("hand", linear=10, channels=4, head=6)
    assert stored.work.flops(model) == 2 * 10 * 6 + 4 * 4 * stored.work.pairs + 2 * 6 * 2
    assert stored.flops(model) == 3 * stored.work.flops(model)
    assert plain.flops(model) == 4 * plain.work.flops(model)  # a live reference runs forward


def test_named_models_are_what_their_configurations_say(tmp_path: Path) -> None:
    sizes = {
        "7b": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32_000},
        "8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128_256},
    }
    for name, own in sizes.items():
        config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **own)
        config.save_pretrained(tmp_path / name)
        read = model_size(str(tmp_path / name))
        assert (read.linear, read.channels, read.head) == (
            MODELS[name].linear,
            MODELS[name].channels,
            MODELS[name].head,
        )
    # What is published: 6.74 and 8.03 billion, embeddings included.
    assert MODELS["7b"].linear + 2 * MODELS["7b"].head == pytest.approx(6.74e9, rel=1e-3)
    assert MODELS["8b"].linear + 2 * MODELS["8b"].head == pytest.approx(8.03e9, rel=1e-3)


def test_experts_count_as_often_as_a_token_is_sent_to_them(tmp_path: Path) -> None:
    MixtralConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=100,
    ).save_pretrained(tmp_path)
    read = model_size(str(tmp_path))
    assert read.linear == 3 * (8 * (2 * 8 + 2 * 4) + 2 * 3 * 8 * 16 + 8 * 4)


def test_files_of_lengths_and_of_candidates(tmp_path: Path) -> None:
    lengths, candidates = tmp_path / "lengths.jsonl", tmp_path / "candidates.jsonl"
    lengths.write_text('{"prompt": 3, "candidates": [2, 1]}\n\n{"prompt": 5, "candidates": [4]}\n')
    record = {"prompt_ids": [7, 7, 7], "candidates": [{"token_ids": [1, 2]}, {"token_ids": [1]}]}
    candidates.write_text(json.dumps(record) + "\n")
    assert read_groups(str(lengths), None) == [Lengths(3, (2, 1)), Lengths(5, (4,))]
    assert read_groups(str(candidates), None) == [Lengths(3, (2, 1))]
    assert read_groups(str(candidates), 3) == [Lengths(3, (2, 1, 2))]
    assert read_groups(str(lengths), 1) == [Lengths(3, (2,)), Lengths(5, (4,))]


def test_texts_are_measured_by_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words(50).save_pretrained(tmp_path / "tokenizer")
    pairs, rewarded = tmp_path / "pairs.jsonl", tmp_path / "rewarded.jsonl"
    pairs.write_text('{"prompt": "w3 w4", "chosen": " w5 w6 w7", "rejected": " w8"}\n')
    rewarded.write_text('{"prompt": "w3", "completions": [" w5", " w6 w7", " w8"], "rewards": [1, 2, 3]}\n')
    # End of sequence is a token of a candidate, beginning of sequence one of the prompt.
    pair, several = (read_groups(str(path), None, tmp_path / "tokenizer")[0] for path in (pairs, rewarded))
    assert pair.candidates == (4, 2)
    assert several.candidates == (2, 3, 2)
    assert pair.prompt == several.prompt + 1
    assert main(["predict", "--lengths", str(pairs)]) == 2
    assert "--tokenizer: is not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"prompt": 3, "candidates": []}', '{"prompt": 0, "candidates": [1]}', '{"prompt": "x"}'],
)
def test_unusable_files_are_told_with_their_line(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"prompt": 3, "candidates": [2, 1]}\n' + line + "\n")
    assert main(["predict", "--lengths", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:2: no lengths of a group")


def test_unusable_arguments_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    for arguments, message in (
        (["--lengths", "hhh"], "'hhh' is no file"),
        (["--lengths", str(tmp_path / "empty")], "has no groups"),
        (["--lengths", "hh", "--k", "0"], "--k: is 0"),
        (["--lengths", "hh", "--model", "70b"], "--model: is '70b'"),
    ):
        assert main(["predict", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_table_of_a_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--lengths", "tldr", "--k", "8", "--model", "7b"]) == 0
    printed = capsys.readouterr().out
    assert "Llama 2 7B, 512 groups of K=8" in printed
    # (400, 50, 8) has 4.45 by the formula of sharing alone.
    table = predict([Lengths(400, (50,) * 8)], MODELS["7b"])
    gains = {row[0]: float(row[-1]) for row in table.rows}
    assert gains["plain"] == 1.0
    assert gains["+ shared prompts"] == gains["+ packing"] == pytest.approx(4.45, rel=0.012)
    assert gains["+ shared prompts"] < gains["+ response-only output layer"] < 1.03 * gains["+ shared prompts"]
    assert gains["+ stored log-probs"] == pytest.approx(gains["+ response-only output layer"] * 4 / 3, rel=0.01)
