"""Files from strangers end in one line, in bounded time and memory: expansions, long lines, pipes, absurd sizes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from exo_megatron.config.document import parse_value, read_document
from exo_megatron.conversion.families import FAMILIES
from exo_megatron.conversion.hf_reader import read_config
from exo_megatron.data import text_files
from exo_megatron.data.records import finite_numbers
from exo_megatron.data.sources import open_source
from exo_megatron.data.tokenizer import load_tokenizer
from exo_megatron.errors import CheckpointError, ConfigError, DataError, ExoError
from exo_megatron.models.spec import ModelSpec
from exo_megatron.rewards.classifier import load_classifier
from exo_megatron.utils import files
from exo_megatron.utils.files import read_json, read_jsonl
from tests.unit.data.loader import Loader, pair

SMALL = 1000
"""The limits of a line and of an array in these tests."""


@contextmanager
def within(seconds: int = 20, megabytes: int = 64) -> Iterator[None]:
    """Fail a block that takes longer or more memory, as a file without an end would."""

    def late(number: int, frame: object) -> None:
        pytest.fail(f"still not done after {seconds} s")  # no Exception, which readers turn into their own

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", SMALL)
    monkeypatch.setattr(text_files, "LONGEST_LINE", SMALL)
    monkeypatch.setattr(text_files, "LARGEST_ARRAY", SMALL)


def lists_of_lists(levels: int) -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


KEYS = "{" + ",".join(f"k{n}: 1" for n in range(6000)) + "}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (lists_of_lists(9), "its aliases make more than 10,000 values"),
        ("{<<: [" + ",".join(["{a: 1}"] * 200) + "]}", "a mapping merges more than 100 others"),
        (f"<<: [&a {KEYS}, {{<<: *a}}]", "merging makes more than 10,000 entries"),
    ],
    ids=["lists", "one mapping", "mappings"],
)
def test_aliases_that_stand_for_too_much_are_refused(text: str, problem: str) -> None:
    with within(), pytest.raises(ConfigError, match=problem):
        parse_value(text, "c.yaml", str)


def test_few_aliases_are_read() -> None:
    value, _ = parse_value("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]", "c.yaml", str)
    assert value == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}


def test_a_line_or_array_that_is_too_long_is_refused_by_its_place(tmp_path: Path, small_limits: None) -> None:
    whole = json.dumps({"prompt": "w" * (SMALL - 20)})
    (tmp_path / "lines.jsonl").write_text(f"{whole}\n" + json.dumps({"prompt": "w" * SMALL}) + "\n")
    with pytest.raises(DataError, match=r"lines\.jsonl:2: has more than 1,000 bytes"):
        open_source(str(tmp_path / "lines.jsonl")).read()
    with pytest.raises(DataError, match=r"lines\.jsonl:2: has more than 1,000 bytes"):
        list(read_jsonl(tmp_path / "lines.jsonl"))
    (tmp_path / "short.jsonl").write_text(f"{whole}\n")
    assert SMALL - 20 < len(whole) < SMALL and len(open_source(str(tmp_path / "short.jsonl")).read()) == 1
    (tmp_path / "array.json").write_text(json.dumps([{"prompt": "w"}] * SMALL))
    with pytest.raises(DataError, match=r"one JSON value of more than 1,000 bytes"):
        open_source(str(tmp_path / "array.json")).read()
    (tmp_path / "cells.csv").write_text("prompt\nw\n" + "w" * 2 * SMALL + "\n")
    with pytest.raises(DataError, match=r"cells\.csv:3: has more than 1,000 bytes"):
        open_source(str(tmp_path / "cells.csv")).read()


@pytest.mark.parametrize("beginning", [b"[", b'{"prompt":"'])
def test_a_compressed_file_is_read_no_further_than_a_line_may_be_long(
    beginning: bytes, tmp_path: Path, small_limits: None
) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(beginning)
        for _ in range(200):
            file.write(b"[" * 2**20)
    with within(), pytest.raises(DataError, match=r"more than 1,000 bytes"):
        open_source(str(path)).read()


class Panic(BaseException):
    """As pyo3 raises for a panic in Rust."""


def test_a_record_that_the_tokenizer_cannot_encode_is_named(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = type(loader.tokenizer._codec)
    encode = codec.encode_batch

    def panics(self: object, texts: list[str], *, continuation: bool) -> list[list[int]]:
        if any("poison" in text for text in texts):
            raise Panic("index out of bounds")
        return encode(self, texts, continuation=continuation)  # type: ignore[arg-type]

    monkeypatch.setattr(codec, "encode_batch", panics)
    error = loader.error(loader.groups, [pair("a"), pair("b", rejected=" was poison"), pair("c")])
    assert error.where == f"{loader.file}:2"
    assert "Panic: index out of bounds" in error.problem


@pytest.mark.parametrize("reward", [1e300, -1e13])
def test_absurd_rewards_are_told_at_the_record(reward: float) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:3: 'rewards\[1\]' is .*from -1e\+12 to 1e\+12"):
        finite_numbers("data.jsonl:3", {"rewards": [1.0, reward]}, "rewards")
    assert finite_numbers("data.jsonl:3", {"rewards": [1e12]}, "rewards") == (1e12,)


def _tokenizer(path: Path) -> object:
    (path.parent / "tokenizer.json").write_text("{}")
    path.rename(path.with_name("tokenizer_config.json"))
    return load_tokenizer(path.parent)


def _classifier(path: Path) -> object:
    (path.parent / "config.json").write_text("{}")
    (path.parent / "model.safetensors").write_bytes(b"")
    path.rename(path.with_name("tokenizer.json"))
    return load_classifier(path.parent, label=None, batch_size=1, device=None, tell=print)  # type: ignore[arg-type]


def _hf(path: Path) -> object:
    path.rename(path.with_name("config.json"))
    return read_config(path.parent)


READERS: dict[str, Callable[[Path], object]] = {
    "configuration": read_document,
    "data": lambda path: open_source(str(path.rename(path.with_suffix(".jsonl")))).read(),
    "JSON": read_json,
    "JSON lines": lambda path: list(read_jsonl(path)),
    "tokenizer": _tokenizer,
    "reward model": _classifier,
    "HF checkpoint": _hf,
}


@pytest.mark.parametrize("what", READERS)
def test_a_pipe_in_place_of_a_file_is_refused(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with within(megabytes=400), pytest.raises(ExoError, match="is a pipe"):
        READERS[what](tmp_path / "pipe")


def test_a_device_in_place_of_a_configuration_is_refused() -> None:
    with within(), pytest.raises(ConfigError, match="pipe or a device"):
        read_document(Path("/dev/zero"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sizes_that_no_model_has_are_refused_before_anything_grows_with_them(family: str) -> None:
    sizes = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), 10**8)
    common = {"hidden_size": 64, "n_embd": 64, "num_attention_heads": 4, "n_head": 4, "vocab_size": 100}
    common |= {"num_key_value_heads": 4, "multi_query_group_num": 2, "multi_query_attention": True}
    values = {**common, "intermediate_size": 8, "model_type": family, **sizes}
    with within(), pytest.raises(CheckpointError, match=r"layers? is 100000000|n_layer is 100000000"):
        FAMILIES[family].read_config(values, "config.json")
    values |= dict.fromkeys(sizes, 2) | {"vocab_size": 10**9, "padded_vocab_size": 10**9}
    with within(), pytest.raises(CheckpointError, match="vocab_size"):
        FAMILIES[family].read_config(values, "config.json")


def test_experts_are_bounded_over_all_layers(spec_of_experts: dict[str, object]) -> None:
    ModelSpec.model_validate(spec_of_experts)
    with pytest.raises(ValidationError, match="10000 layers of 10000 experts"):
        experts = {**spec_of_experts["experts"], "count": 10_000}  # type: ignore[dict-item]
        ModelSpec.model_validate({**spec_of_experts, "layers": 10_000, "experts": experts})


@pytest.fixture
def spec_of_experts() -> dict[str, object]:
    sizes = dict.fromkeys(("layers", "heads", "kv_heads"), 2)
    sizes |= dict.fromkeys(("hidden_size", "ffn_hidden_size", "head_dim", "vocab_size", "max_positions"), 8)
    experts = {"count": 4, "per_token": 2, "ffn_hidden_size": 8, "normalized": True}
    return {"family": "mixtral", **sizes, "norm_epsilon": 1e-6, "rotary": None, "experts": experts}
