"""Groups and prompts come out of tables as they were put in, one by one and all at once."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from exo_megatron.data.groups import Group, GroupLengths, data_digest
from exo_megatron.data.prepared import (
    GroupTable,
    Prepared,
    PreparedGroups,
    PromptTable,
    groups_digest,
    groups_table,
    prompts_digest,
    prompts_table,
)
from exo_megatron.data.prompts import Prompt
from exo_megatron.data.text import Chat
from tests.reference.prepared import prepared_prompts

PLAIN = Group("plain", (1, 5), ((7, 2), (8, 9, 2)))
FULL = Group(
    "full é",
    (1,),
    ((7, 2), (2**31 - 1,), (8, 9, 2)),
    rewards=(0.1, -1e300, 0.0),
    reference_logprobs=(-1.5, -0.25, -1e-9),
    log_weights=(0.0, 0.0, -3.5),
    reference_token_logprobs=((-1.0, -0.5), (0.0,), (-1.0, -2.0, -3.0)),
    behaviour_token_logprobs=((-1.1, -0.6), (-0.1,), (-1.2, -2.2, -3.2)),
)
GROUPS = [
    PLAIN,
    FULL,
    *(
        replace(PLAIN, id=name, **{name: vars(FULL)[name][:2]})
        for name in ("rewards", "reference_logprobs", "log_weights")
    ),
    replace(PLAIN, id="per token", reference_token_logprobs=((-1.0, -2.0), (-1.0, -2.0, -3.0))),
]

CHAT = Chat(
    (
        {"role": "user", "content": "Où ?"},
        {"role": "assistant", "content": None, "tool_calls": [{"x": [1, 2.5, None]}]},
    ),
    ({"type": "function", "function": {"name": "f"}},),
)
PROMPTS = [
    Prompt("a", "The movie", (1, 4)),
    Prompt("b", "Où ?\n", (1,), CHAT, {"answer": 4, "deep": {"x": [True, None]}}),
    Prompt("c", "", (3,), Chat(({"role": "user", "content": ""},)), {}),
]


def stored(table: pa.RecordBatch, file: Path) -> pa.RecordBatch:
    """A table as it is mapped from a file."""
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_batch(table)
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)


def tables(make, items, directory: Path) -> list[pa.RecordBatch]:
    """The items in tables of two, between tables without any."""
    parts = [[], items[:2], [], items[2:4], items[4:], []]
    rows = [[(f"f:{item.id}", item) for item in part] for part in parts]
    return [stored(make(part), directory / f"{number}.arrow") for number, part in enumerate(rows)]


def test_groups(tmp_path: Path) -> None:
    parts = tables(groups_table, GROUPS, tmp_path)
    groups = Prepared(parts, GroupTable, "")
    assert list(groups) == GROUPS
    assert [groups[number] for number in range(len(GROUPS))] == GROUPS
    assert groups[1:4] == GROUPS[1:4] and groups[-1] == GROUPS[-1]
    for group in groups:
        assert {type(value) for value in (*group.prompt, *group.candidates[0])} == {int}
        assert group.rewards is None or {type(value) for value in group.rewards} == {float}
    assert [where for part in parts for where in part.column("where").to_pylist()] == [f"f:{g.id}" for g in GROUPS]
    assert groups_digest(parts) == data_digest(groups) == data_digest(GROUPS)
    # One candidate, as sft has it; an id that needs escapes; a candidate of one token.
    single = [Group("'a\"\n\u2028", (5, 6), ((7,),)), *GROUPS]
    (tmp_path / "single").mkdir()
    assert groups_digest(tables(groups_table, single, tmp_path / "single")) == data_digest(single)
    assert data_digest(single) == hashlib.sha256("".join(map(_written, single)).encode()).hexdigest()


def _written(group: Group) -> str:
    """The text that is digested, in Python's own words."""
    names = ("log_weights", "reference_token_logprobs", "behaviour_token_logprobs")
    further = [(name, vars(group)[name]) for name in names if vars(group)[name] is not None]
    return repr((group.id, group.prompt, group.candidates, group.rewards, *further))


def test_lengths_and_later_logprobs(tmp_path: Path) -> None:
    groups = PreparedGroups(Prepared(tables(groups_table, GROUPS, tmp_path), GroupTable, ""))
    of_list = GroupLengths.of(GROUPS)
    for name in ("prompts", "counts", "candidates"):
        assert vars(groups.lengths)[name].tolist() == vars(of_list)[name].tolist()
    lacking = [number for number, group in enumerate(GROUPS) if group.reference_logprobs is None]
    assert groups.lacking_logprobs() == lacking
    later = groups.with_logprobs(lacking, [(-7.0 - number, -0.5) for number in lacking])
    for number, group in enumerate(GROUPS):
        expected = group if number not in lacking else replace(group, reference_logprobs=(-7.0 - number, -0.5))
        assert later[number] == expected
        assert groups[number] == group


def test_prompts(tmp_path: Path) -> None:
    parts = tables(prompts_table, PROMPTS, tmp_path)
    prompts = Prepared(parts, PromptTable, "")
    assert list(prompts) == PROMPTS == prompts[:]
    assert [prompts[number] for number in range(3)] == PROMPTS
    digest = prepared_prompts(PROMPTS).digest
    assert prompts_digest(parts) == digest
    for number, changed in enumerate(
        ({"id": "x"}, {"text": "x"}, {"ids": (9,)}, {"chat": None}, {"columns": {"y": 1}})
    ):
        other = [PROMPTS[0], replace(PROMPTS[1], **changed), PROMPTS[2]]
        assert prepared_prompts(other).digest != digest, number
