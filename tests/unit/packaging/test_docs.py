"""What the documents point at is there: files, functions, tests, and configuration keys."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from exo_megatron.config.load import load_run_config, load_stage_config
from exo_megatron.conversion.families import FAMILIES

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document: Path) -> None:
    # test_extending.py applies the diffs, which may make files.
    text = re.sub(r"```diff\n.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")}
    missing = {link for link in links if not (document.parent / link).exists()}
    paths = set(re.findall(r"\b(?:exo_megatron|tests|tools|slurm|examples)/[\w./-]*\w", text))
    missing |= {path for path in paths if not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_functions_and_tests_exist(document: Path) -> None:
    named = re.findall(r"\b((?:exo_megatron|tests)/[\w/]+\.py)::?(\w+)", document.read_text(encoding="utf-8"))
    missing = {(path, name) for path, name in named if name not in definitions(ROOT / path)}
    assert not missing


def test_the_6b_configuration_is_valid() -> None:
    config = load_stage_config("align", ROOT / "examples" / "configs" / "align_6b.yaml", [])
    assert config.output == Path("outputs/align_6b")


def yaml_block(document: Path, directory: Path) -> Path:
    (block,) = re.findall(r"```yaml\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    file = directory / "document.yaml"
    file.write_text(block, encoding="utf-8")
    return file


def test_the_configuration_of_the_readme_is_valid(tmp_path: Path) -> None:
    file = yaml_block(ROOT / "README.md", tmp_path)
    load_stage_config("align", file, ["loss.kind=dpo_rw", "output=outputs/dpo"])


def test_the_run_file_of_the_documents_is_valid(tmp_path: Path) -> None:
    run = load_run_config(yaml_block(ROOT / "docs" / "config.md", tmp_path), ["stages.exo.optimizer.lr=5e-7"])
    assert [stage.upstream for stage in run.stages] == [(), ("sft",), ("rollout",), ("sft", "score")]


def test_the_table_of_families_is_complete() -> None:
    text = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    section = text.partition("## Families\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    assert [model_type for model_type, _ in rows] == sorted(FAMILIES)
    for model_type, row in rows:
        models, cut, reward, embeddings, _ = (cell.strip() for cell in row.split("|"))
        classifies = any(name.endswith("ForSequenceClassification") for name in FAMILIES[model_type].architectures)
        assert models and embeddings
        assert ("EP" in cut) == (model_type in ("mixtral", "qwen3_moe"))
        assert reward.startswith("yes" if classifies else "no"), model_type
