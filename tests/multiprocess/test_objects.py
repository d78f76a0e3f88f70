"""Python objects go over a gloo group of their own, in messages that do not grow with the data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import exo_megatron
from exo_megatron.parallel.runtime import CHUNK_BYTES
from tests.multiprocess.harness import Check, Outcome, run_checks

RANKS = 3
CHUNK = 2048
CHECKS = "tests.multiprocess.object_checks:"
SOURCES = Path(exo_megatron.__file__).parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    arguments = {"none": (0, CHUNK), "some": (60, CHUNK), "singly": (60, 1), "at once": (60, CHUNK_BYTES)}
    checks = [
        Check(name, CHECKS + "values_and_order", {"count": count, "chunk": chunk})
        for name, (count, chunk) in arguments.items()
    ]
    checks.append(Check("small", CHECKS + "small_objects", {}))
    for prompts in (6, 60, 1200):
        checks.append(Check(f"{prompts} prompts", CHECKS + "largest_message", {"prompts": prompts, "chunk": CHUNK}))
    weights = tmp_path_factory.mktemp("weights")
    checks.append(Check("save", CHECKS + "saved_tensors", {"directory": weights}))
    return run_checks(RANKS, checks, tmp_path_factory.mktemp("objects"))


@pytest.mark.parametrize("name", ["none", "some", "singly", "at once"])
def test_chunks_give_the_items_of_one_object_in_its_order(outcomes: dict[str, Outcome], name: str) -> None:
    first, *others = outcomes[name].values()
    assert first["chunked"] == first["whole"]
    assert {item[0] for item in first["chunked"]} == ({2} if name == "none" else {0, 2})
    for other in others:
        assert (other["chunked"], other["whole"]) == (None, None)
        assert other["spread"] == first["spread"] == first["chunked"]


def test_small_objects_go_over_the_group_for_objects(outcomes: dict[str, Outcome]) -> None:
    for rank, found in enumerate(outcomes["small"].values()):
        assert found["calls"] >= 7
        assert (found["own"], found["not the default"], found["backend"]) == (True, True, "gloo")
        assert found["shared"] == [0, 1, 2]
        assert found["gathered"] == ([0, 1, 2] if rank == 0 else None)


def test_no_message_grows_with_the_number_of_prompts(outcomes: dict[str, Outcome]) -> None:
    for prompts in (6, 60, 1200):
        for rank, found in enumerate(outcomes[f"{prompts} prompts"].values()):
            assert found["largest"] <= CHUNK + found["one record"] + 100
            assert found["everywhere"]
            assert found["scored"] == (found["expected"] if rank == 0 else None)
    assert outcomes["1200 prompts"].values()[0]["all records"] > 50 * CHUNK


def test_plans_and_records_of_a_checkpoint_go_over_the_group_for_objects(outcomes: dict[str, Outcome]) -> None:
    """megatron-core's own check of the shards takes the default group, and has no argument for another."""
    for found in outcomes["save"].values():
        assert found["own"] >= {"gather_object", "scatter_object_list"}
        assert found["default"] <= {"all_gather_object"}


def test_every_collective_of_objects_names_the_group_for_objects() -> None:
    """Without a group it would take the default one, which is NCCL's on a GPU."""
    calls = {path.relative_to(SOURCES).as_posix(): list(_of_objects(path)) for path in SOURCES.rglob("*.py")}
    assert {name for name, found in calls.items() if found} == {"parallel/runtime.py", "checkpoint/load.py"}
    for call in (call for found in calls.values() for call in found):
        groups = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "group"]
        assert groups in (["_World.objects"], ["objects_group()"])


def _of_objects(path: Path) -> Iterator[ast.Call]:
    names = {"broadcast_object_list", "gather_object", "all_gather_object", "scatter_object_list", "send_object_list"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            yield node
