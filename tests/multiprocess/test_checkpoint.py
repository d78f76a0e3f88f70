"""Conversion, saving and loading by several processes: the same bytes as by one, and failures shared by all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exo_megatron.checkpoint.directory import list_steps, resolve_checkpoint, step_directory, weights_path
from exo_megatron.checkpoint.load import read_trainer_state
from exo_megatron.checkpoint.safety import verify_checkpoint
from exo_megatron.checkpoint.tensors import StoredTensors
from tests.multiprocess.harness import Check, Outcome, WorldFailure, run_checks
from tests.reference.tiny_llama import save_hf, tiny_config, tiny_llama

CHECKS = "tests.multiprocess.checkpoint_checks"
TOPOLOGIES = [(2, 1), (1, 2), (1, 1)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def outcomes(place: Path) -> dict[str, Outcome]:
    """All checks of a world of two, in the order of the list."""
    for name, tied in (("untied", False), ("tied", True)):
        save_hf(tiny_llama(tiny_config(tied=tied, num_hidden_layers=2), seed=5), place / name / "hf")
    checks = []
    for name in ("untied", "tied"):
        at = place / name
        arguments = {"hf": at / "hf", "checkpoint": at / "imported", "exported": at / "exported"}
        checks.append(Check(f"convert {name}", f"{CHECKS}:convert", arguments))
        source = at / "imported"
        for tensor, pipeline in TOPOLOGIES:
            target = step_directory(at / f"tp{tensor}pp{pipeline}" / "checkpoints", 4)
            target.parent.mkdir(parents=True)  # a save makes no output of a stage, which may have been taken away
            arguments = {"source": source, "target": target, "tensor": tensor, "pipeline": pipeline}
            checks.append(Check(f"{name} {tensor} {pipeline}", f"{CHECKS}:load_and_save", arguments))
            source = target.parent.parent
    damaged = place / "untied" / "damaged"
    hf = place / "untied" / "hf"
    checks += [
        Check("fail", f"{CHECKS}:fail_on_last_rank", {}),
        Check("unreadable", f"{CHECKS}:read_fails_while_importing", {"hf": hf, "output": place / "failed"}),
        Check("to damage", f"{CHECKS}:convert", {"hf": hf, "checkpoint": damaged, "exported": place / "e"}),
        Check("verify", f"{CHECKS}:verify", {"checkpoint": damaged}),
    ]
    found = run_checks(2, checks, place / "logs")
    for path in weights_path(damaged).glob("__1_*.distcp"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    found |= run_checks(2, [Check("verify damaged", f"{CHECKS}:verify", {"checkpoint": damaged})], place / "again")
    return found


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_conversion_by_two(outcomes: dict[str, Outcome], place: Path, name: str) -> None:
    outcomes[f"convert {name}"].values()
    assert len(list(weights_path(place / name / "imported").glob("*.distcp"))) == 2, "both ranks write"
    before = load_file(place / name / "hf" / "model.safetensors")
    after = load_file(place / name / "exported" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize(("tensor", "pipeline"), TOPOLOGIES)
def test_any_topology_loads_what_another_saved(
    outcomes: dict[str, Outcome], place: Path, name: str, tensor: int, pipeline: int
) -> None:
    shapes = outcomes[f"{name} {tensor} {pipeline}"].values()
    assert shapes[0]["embedding.word_embeddings.weight"] == (128 // tensor, 64)
    assert ("embedding.word_embeddings.weight" in shapes[1]) == (pipeline == 1)
    saved = resolve_checkpoint(place / name / f"tp{tensor}pp{pipeline}")
    verify_checkpoint(saved)
    assert read_trainer_state(saved) == {"step": 4}
    imported, again = (StoredTensors(weights_path(path)) for path in (place / name / "imported", saved))
    assert imported.keys() == again.keys()
    for key in imported.keys():  # noqa: SIM118 - not a dict
        assert torch.equal(imported.read(key), again.read(key)), key


def test_failure_of_one_is_told_by_all_in_the_same_words(outcomes: dict[str, Outcome]) -> None:
    first, second = outcomes["fail"].values()
    assert first == second == "here: broken; expected whole; fix: mend"


def test_unreadable_source_leaves_nothing(outcomes: dict[str, Outcome], place: Path) -> None:
    first, second = outcomes["unreadable"].values()
    assert first == second
    assert first.endswith("hf: is gone; expected the file; fix: bring it back")
    assert not [path for path in place.iterdir() if path.name.endswith("failed")]


def test_damage_is_found_by_whichever_rank_reads_it(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["verify"].values() == ("no error", "no error")
    first, second = outcomes["verify damaged"].values()
    assert first == second
    assert "__1_0.distcp: is corrupt" in first


def test_killed_rank_leaves_the_older_checkpoint_newest(
    outcomes: dict[str, Outcome], place: Path, tmp_path: Path
) -> None:
    root = place / "untied" / "tp1pp1" / "checkpoints"
    arguments = {"source": root.parent, "target": step_directory(root, 5)}
    killed = run_checks(2, [Check("killed", f"{CHECKS}:killed_while_saving", arguments)], tmp_path)["killed"]
    with pytest.raises(WorldFailure, match="-9"):
        killed.values()
    assert not (root / "tmp-step-00000005").exists(), "rank 0 notices and removes it"
    assert [step for step, _ in list_steps(root)] == [4]
    verify_checkpoint(resolve_checkpoint(root))
