"""YAML: scalars of 1.2, duplicate keys, tags, where values come from, and writing back what was read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from exo_megatron.config.document import dump_yaml, parse_value, read_document
from exo_megatron.errors import ConfigError


def read(tmp_path: Path, text: str):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return read_document(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # What YAML 1.1 would read as booleans, base-60 numbers and dates are texts.
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("1_000", "1_000"),
        ("'1e-6'", "1e-6"),
        ("pkg.mod:name", "pkg.mod:name"),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
    ],
)
def test_scalars(text, value):
    got, _ = parse_value(text, "x", str)
    assert got == value
    assert type(got) is type(value)


def test_nan_is_a_number():
    assert math.isnan(parse_value(".nan", "x", str)[0])


def test_origins_name_line_and_key(tmp_path):
    document = read(tmp_path, "a:\n  b: 1\n  c: [x, {d: 2}]\n")
    file = tmp_path / "c.yaml"
    assert document.where(("a", "b")) == f"{file}:2: a.b"
    assert document.where(("a", "c", 1, "d")) == f"{file}:3: a.c.1.d"
    assert document.where(("a", "missing")) == f"{file}:1: a.missing"
    assert document.where(("nowhere",)) == f"{file}: nowhere"


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: a", "stands twice, first on line 1"),
        ("s:\n  x: 1\n  x: 1\n", ":3: s.x", "stands twice, first on line 2"),
        ("a: [1\nb: 2", ":2:", "expected ',' or ']'"),
        ("a: !!python/object:os.system {}", ":1: a", "tag:yaml.org,2002:python/object"),
        ("a: !!binary aGk=", ":1: a", "binary"),
        ("a: !!int x", ":1: a", "'x'"),
        ("[1, 2]", "c.yaml", "holds [1, 2]"),
        ("a: &a [*a]", "c.yaml", "refers to itself"),
        ("a: 1\n---\nb: 2", ":2:", "another document"),
        ("? [1, 2]\n: 3", ":1", "a key is a list or mapping"),
    ],
)
def test_flaws_are_told_in_one_line(tmp_path, text, where, words):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert where in caught.value.where
    assert words in caught.value.problem
    assert len(str(caught.value).splitlines()) == 1


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_document(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_document(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="byte 3 is not UTF-8"):
        read_document(tmp_path / "latin.yaml")


def test_empty_file_and_byte_order_mark(tmp_path):
    assert read(tmp_path, "# nothing\n").data == {}
    assert read(tmp_path, "\ufeffa: 1\n").data == {"a": 1}


def test_merge_keys_and_anchors_make_copies(tmp_path):
    document = read(tmp_path, "base: &b {x: 1, y: {z: 2}}\nmine:\n  <<: *b\n  x: 5\nother: *b\n")
    assert document.data["mine"] == {"x": 5, "y": {"z": 2}}
    document.data["other"]["y"]["z"] = 9
    assert document.data["base"]["y"]["z"] == 2
    assert document.data["mine"]["y"]["z"] == 2


@pytest.mark.parametrize("text", ["1e-6", "no", "on", "2024-01-02", "010", "0o7", "~", "", "a: b", "- x", "é\n#"])
def test_texts_survive_writing(tmp_path, text):
    assert read(tmp_path, dump_yaml({"a": text})).data == {"a": text}
