"""Verification finds planted errors in both directions, and only those."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multiprocess.harness import REPOSITORY, Check, Outcome, run_checks, start_group, wait_group
from tests.multiprocess.verify_checks import PLANTS, Finding
from tests.reference.tiny_llama import save_hf, text, tiny_config, tiny_llama

CHECKS = "tests.multiprocess.verify_checks:"
TOOL = REPOSITORY / "tools" / "verify_conversion.py"
KINDS = {
    "plain": (torch.float32, ("keep", "keep")),
    "tied-bf16": (torch.bfloat16, ("fp32", "keep")),
    "narrowed": (torch.float32, ("bf16", "fp32")),
    "narrowed-back": (torch.float32, ("keep", "bf16")),
}
"""Type of the HF weights, and `dtype` of the import and of the export."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify")
    for name, (dtype, _) in KINDS.items():
        config = tiny_config(num_hidden_layers=2, tied=name.startswith("tied"))
        save_hf(tiny_llama(config, seed=3, dtype=dtype), directory / f"hf-{name}")
    (directory / "prompts.txt").write_text(f"{text([5, 6, 7, 100, 9])}\n\n{text([50])}\n")
    answers = [text([3, 4]), text([99])]
    (directory / "prompts.jsonl").write_text(json.dumps({"prompt": text([8, 9]), "completions": answers}))
    return directory


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Outcome]:
    """What one process finds, after it has made every kind there and back and one pair for each planted error."""

    def check(name: str, function: str, **arguments: Any) -> Check:
        return Check(name, f"{CHECKS}{function}", arguments)

    def find(name: str, hf: str, checkpoint: str, **more: Any) -> Check:
        return check(name, "find", hf=root / hf, checkpoint=root / checkpoint, **more)

    checks = []
    for name, (_, dtypes) in KINDS.items():
        places = {"hf": root / f"hf-{name}", "checkpoint": root / name, "exported": root / f"back-{name}"}
        checks += [
            check(f"make {name}", "convert", **places, dtypes=dtypes),
            find(f"{name} import", f"hf-{name}", name),
            find(f"{name} export", f"back-{name}", name, made="export" if name == "narrowed-back" else None),
        ]
    for number, kind in enumerate(PLANTS):
        checks += [
            check(f"plant {kind}", "plant", source=root / "plain", target=root / f"bad-{number}", kind=kind),
            check(f"damage {kind}", "damage", source=root / "back-plain", target=root / f"bad-hf-{number}", kind=kind),
            find(f"import {kind}", "hf-plain", f"bad-{number}"),
            find(f"export {kind}", f"bad-hf-{number}", "plain"),
        ]
    (root / "empty").mkdir()
    checks += [
        check("change", "change_on_disk", source=root / "plain", target=root / "changed"),
        find("changed on disk", "hf-plain", "changed"),
        find("lines", "hf-plain", "plain", prompts=root / "prompts.txt"),
        find("records", "hf-plain", "plain", prompts=root / "prompts.jsonl"),
        check("misread", "misread", hf=root / "hf-plain", output=root / "misread"),
        check("bad import", "broken_import", hf=root / "hf-plain", output=root / "empty" / "checkpoint"),
        check("bad export", "broken_export", checkpoint=root / "plain", output=root / "empty" / "hf"),
    ]
    outcomes = run_checks(1, checks, root / "alone")
    for outcome in outcomes.values():
        outcome.values()
    return outcomes


def verdicts(finding: Finding) -> dict[str, str]:
    assert not finding.error
    return {name: check.verdict for name, check in finding.rows.items()}


ALL_PASS = {"description": "pass", "tensors": "pass", "logits": "pass"}


@pytest.mark.parametrize("way", ["import", "export"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_false_alarm(alone: dict[str, Outcome], kind: str, way: str) -> None:
    (finding,) = alone[f"{kind} {way}"].values()
    assert verdicts(finding) == ALL_PASS, finding


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_swapped_block(alone: dict[str, Outcome], way: str) -> None:
    (finding,) = alone[f"{way} swapped q/k block"].values()
    assert verdicts(finding) == {"description": "pass", "tensors": "FAIL", "logits": "FAIL"}
    query, key = finding.rows["tensors"].details
    assert query.startswith("model.layers.1.self_attn.q_proj.weight[0, 0]: ") and "1,024 elements differ" in query
    assert key.startswith("model.layers.1.self_attn.k_proj.weight[0, 0]: ")


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_missing_tensor(alone: dict[str, Outcome], way: str) -> None:
    (finding,) = alone[f"{way} missing tensor"].values()
    assert verdicts(finding) == {"description": "pass", "tensors": "FAIL", "logits": "not compared"}
    name = "decoder.final_layernorm.weight" if way == "import" else "model.norm.weight"
    side = "checkpoint" if way == "import" else "HF checkpoint"
    assert finding.rows["tensors"].details == (f"{name} [64] is missing in the {side}",)


@pytest.mark.parametrize("way", ["import", "export"])
def test_one_flipped_bit(alone: dict[str, Outcome], way: str) -> None:
    (finding,) = alone[f"{way} flipped bit"].values()
    assert verdicts(finding) == {"description": "pass", "tensors": "FAIL", "logits": "pass"}
    (line,) = finding.rows["tensors"].details
    assert line.startswith("model.embed_tokens.weight[7, 5]: ") and line.endswith("; 1 elements differ")


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_wrong_rope_base(alone: dict[str, Outcome], way: str) -> None:
    (finding,) = alone[f"{way} wrong rope base"].values()
    assert verdicts(finding) == {"description": "FAIL", "tensors": "pass", "logits": "FAIL"}
    values = ("10000.0 by HF's config.json, 20000.0", "20000.0 by HF's config.json, 10000.0")[way == "export"]
    assert finding.rows["description"].details[0] == f"model.json: rotary.base: {values} in model.json"


def test_a_family_that_misreads_is_found_by_the_logits_alone(alone: dict[str, Outcome]) -> None:
    (finding,) = alone["misread"].values()
    assert verdicts(finding) == {"description": "pass", "tensors": "pass", "logits": "FAIL"}
    assert "tolerance 0.0001 x max(1, " in finding.rows["logits"].details[0]


def test_a_bit_that_changed_on_disk_is_found_by_the_manifest(alone: dict[str, Outcome]) -> None:
    (finding,) = alone["changed on disk"].values()
    assert "distcp: is corrupt (SHA-256" in finding.error


def test_prompts_of_the_user(alone: dict[str, Outcome]) -> None:
    (lines,), (records,) = alone["lines"].values(), alone["records"].values()
    # 3 + 2 tokens: candidates of 2, 2 and 1; one token: three of 1. One position more than tokens for each.
    assert lines.rows["logits"].compared.startswith("14 positions")
    # Two words and one, each with the end of the sequence.
    assert records.rows["logits"].compared.startswith("7 positions")
    assert verdicts(lines) == verdicts(records) == ALL_PASS


@pytest.mark.parametrize(("way", "output"), [("import", "checkpoint"), ("export", "hf")])
def test_a_conversion_that_goes_wrong_leaves_nothing(
    root: Path, alone: dict[str, Outcome], way: str, output: str
) -> None:
    (words,) = alone[f"bad {way}"].values()
    assert words.startswith("VerificationFailed 1: ")
    assert f"{root / 'empty' / output}: the conversion differs from its source (tensors: model.embed_tokens" in words
    assert not list((root / "empty").iterdir())


@pytest.fixture(scope="module")
def pair(root: Path, alone: dict[str, Outcome]) -> dict[str, Outcome]:
    """What two processes find."""
    checks = [
        Check(
            f"{kind} {way} {cut}",
            f"{CHECKS}find",
            {"hf": root / f"{source}-{kind}", "checkpoint": root / kind, cut: 2},
        )
        for kind in ("plain", "tied-bf16")
        for way, source in (("import", "hf"), ("export", "back"))
        for cut in ("tensor", "pipeline")
    ]
    swapped = {"hf": root / "hf-plain", "checkpoint": root / "bad-0"}
    checks.append(Check("swapped", f"{CHECKS}find", swapped | {"tensor": 2}))
    return run_checks(2, checks, root / "pair")


@pytest.mark.parametrize("cut", ["tensor", "pipeline"])
@pytest.mark.parametrize("way", ["import", "export"])
@pytest.mark.parametrize("kind", ["plain", "tied-bf16"])
def test_two_processes(pair: dict[str, Outcome], kind: str, way: str, cut: str) -> None:
    for finding in pair[f"{kind} {way} {cut}"].values():
        assert verdicts(finding) == ALL_PASS, finding


def test_two_processes_find_the_same_on_both_ranks(pair: dict[str, Outcome]) -> None:
    first, second = pair["swapped"].values()
    assert first == second
    assert verdicts(first) == {"description": "pass", "tensors": "FAIL", "logits": "FAIL"}


def test_the_tool_under_a_launcher(root: Path, alone: dict[str, Outcome], tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--hf", str(root / "hf-plain"), "--checkpoint", str(root / "bad-2")]
    problem = wait_group(start_group(2, [*command, "--tensor", "2"], tmp_path), 120)
    assert problem is not None and set(problem.split(", ")) <= {"rank 0 ended with 1", "rank 1 ended with 1"}
    log = (tmp_path / "rank0.log").read_text()
    assert re.search(r"^tensors +21 tensors \(import\) +.*FAIL$", log, re.MULTILINE)
    assert re.search(r"^tensors: model.embed_tokens.weight\[7, 5\]: .* 1 elements differ$", log, re.MULTILINE)
    assert "Traceback" not in log
    assert "tensors" not in (tmp_path / "rank1.log").read_text()


WITHOUT_A_DEVICE = """
import sys, torch

def refusal(name):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"a CUDA device was asked for: {name}")
    return refuse

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
for name in ("current_device", "set_device", "synchronize", "current_stream"):
    setattr(torch.cuda, name, refusal(name))
tool = __import__(f"tools.{sys.argv[1]}", fromlist=["main"])
sys.exit(tool.main(sys.argv[2:]))
"""


def test_conversion_needs_no_gpu(root: Path, tmp_path: Path) -> None:
    """Two processes on a machine that says that it has one CUDA device.

    What they did is read from what they said: with CUDA pretended, gloo now and then aborts a process (-6) that has
    done its work and is ending.
    """
    checkpoint, exported = str(tmp_path / "checkpoint"), str(tmp_path / "exported")
    for tool, *words in (
        ("convert_hf_to_megatron", "--hf", str(root / "hf-plain"), "--output", checkpoint),
        ("convert_megatron_to_hf", "--checkpoint", checkpoint, "--output", exported),
        ("verify_conversion", "--hf", exported, "--checkpoint", checkpoint, "--tensors-only"),
    ):
        command = [sys.executable, "-u", "-c", WITHOUT_A_DEVICE, tool, *words]
        problem = wait_group(start_group(2, command, tmp_path), 120)
        assert problem is None or "ended with -6" in problem, (tmp_path / "rank0.log").read_text()
    said = (tmp_path / "rank0.log").read_text()
    assert f"wrote {checkpoint}" in said and f"wrote {exported}" in said
    assert re.search(r"^tensors +21 tensors \(import\) +0 +pass$", said, re.MULTILINE)
