"""What the documents point at is there (files, functions, tests, configuration keys), and what they tell a reader to
type is real: commands, configurations, settings, paths, extras.
"""

from __future__ import annotations

import ast
import io
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import setuptools
import yaml

from exo_megatron.cli.main import main
from exo_megatron.config.describe import describe_keys
from exo_megatron.config.load import load_command_config, load_run_config, load_stage_config
from exo_megatron.config.stages import COMMAND_CONFIGS, STAGE_CONFIGS, RunConfig
from exo_megatron.conversion.families import FAMILIES
from exo_megatron.errors import ConfigError

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BESIDES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *(ROOT / "examples" / name for name in ("README.md", "frontier/README.md")),
]
DOCUMENTS = [*PAGES, *BESIDES]

SETTINGS = {**STAGE_CONFIGS, **COMMAND_CONFIGS, "run": RunConfig}
"""The commands that have settings, and the classes of these."""

OTHER_PROGRAMS = {".", "git", "lint-imports", "mypy", "pip", "pre-commit", "pytest", "python3 -m venv", "ruff"}
"""What may stand in a bash block besides the project's own commands."""


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


@dataclass(frozen=True)
class Command:
    """One command of a document: `NAME=value` settings before it, its words, and whether a bash block holds it."""

    environment: dict[str, str]
    words: tuple[str, ...]
    in_block: bool

    @property
    def abbreviated(self) -> bool:
        """Whether the reader is to fill something in: `...` or `[key=value ...]`."""
        return any("..." in word for word in self.words)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[Command]:
    """The commands of the bash blocks, and those in inline code that begin with a program of ours."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from split_line(line, in_block=True)
    for code in re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)):
        try:
            found = list(split_line(" ".join(code.split()), in_block=False))
        except ValueError:  # an apostrophe: no command
            continue
        yield from (command for command in found if target(command.words) is not None)


def split_line(line: str, *, in_block: bool) -> Iterator[Command]:
    """The commands of a line, taken apart as bash does."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) - set("&|;"):
            words.append(word)
            continue
        first = next((n for n, each in enumerate(words) if not re.match(r"[A-Z][A-Z0-9_]*=", each)), len(words))
        environment = dict(each.split("=", 1) for each in words[:first])
        if words[first:]:
            yield Command(environment, tuple(words[first:]), in_block)
        words = []


def target(words: Sequence[str]) -> tuple[str, str, tuple[str, ...]] | None:
    """What a command starts, a launcher before it or not: kind, name and the words after it. None: nothing of ours.

    Kinds: `stage` (name: the command of exo-megatron), `tool` (a script or module of tools/), `bash`, `sbatch`.
    """
    program = words[0]
    if program == "exo-megatron":
        return "stage", words[1] if len(words) > 1 else "", tuple(words[2:])
    if program in ("bash", "sbatch"):
        place = next((n for n, word in enumerate(words) if word.endswith(".sh")), None)
        return None if place is None else (program, words[place], tuple(words[place + 1 :]))
    if program not in ("python", "torchrun", "srun", "mpirun"):
        return None
    for place, word in enumerate(words[1:], start=1):
        after = tuple(words[place + 1 :])
        if word == "-m" and after and after[0] == "exo_megatron":
            return "stage", after[1] if len(after) > 1 else "", after[2:]
        if word == "-m" and after and after[0].startswith("tools."):
            return "tool", after[0], after[1:]
        if word.endswith(".py"):
            return "tool", word, after
    return None


def is_placeholder(word: str) -> bool:
    """STAGE, FILE: the reader puts something there."""
    return re.fullmatch(r"[A-Z]*", word) is not None


@cache
def help_of_command(name: str) -> str | None:
    """What `exo-megatron NAME --help` prints; None where there is no such command."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        try:
            code: object = main([name, "--help"])
        except SystemExit as leaving:
            code = leaving.code
    return None if code else printed.getvalue()


@cache
def help_of_tool(name: str) -> str | None:
    """What a script or module of tools/ prints for --help; None where it is not there."""
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/"))
    if not (path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
        return None
    start = [name] if name.endswith(".py") else ["-m", name]
    answer = subprocess.run(
        [sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return answer.stdout


def find_problems(command: Command, document: Path) -> Iterator[str]:
    """Everything about a command that a reader who types it would stumble over."""
    found = target(command.words)
    if found is None:
        programs = {command.words[0], " ".join(command.words[:3])}
        if not programs & OTHER_PROGRAMS:
            yield f"{command.words[0]}: neither a command of ours nor one of OTHER_PROGRAMS"
        return
    kind, name, rest = found
    match kind:
        case "stage":
            yield from stage_problems(name, rest, command, document)
        case "tool":
            yield from tool_problems(name, rest)
        case "bash" | "sbatch":
            yield from script_problems(kind, name, rest, command, document)


def stage_problems(stage: str, rest: Sequence[str], command: Command, document: Path) -> Iterator[str]:
    if is_placeholder(stage) or stage in ("--help", "--version"):
        return
    text = help_of_command(stage)
    if text is None:
        yield f"exo-megatron has no command {stage}"
        return
    if stage not in SETTINGS:
        yield from (f"{stage} has no option {word}" for word in rest if word.startswith("--") and word not in text)
        return
    config, settings, strange = parse_settings(rest)
    yield from (f"{stage} takes no {word!r}" for word in strange if "..." not in word)
    yield from setting_problems(stage, settings)
    if "--help" not in rest and (settings or config is not None or command.in_block):
        yield from config_problems(stage, config, settings, command, document)


def parse_settings(words: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """The file after --config, the key=value settings, and what is neither."""
    config: str | None = None
    settings: list[str] = []
    strange: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            config = rest.pop(0)
        elif re.match(r"[\w.]+=", word):
            settings.append(word)
        elif word != "--help":
            strange.append(word)
    return config, settings, strange


def setting_problems(stage: str, settings: Sequence[str]) -> Iterator[str]:
    for setting in settings:
        key = setting.partition("=")[0]
        if not is_key(stage, key):
            yield f"{stage} has no key {key}"


def is_key(stage: str, key: str) -> bool:
    """Whether `key=value` may be given to a stage: a key, a whole section, or an entry of a mapping of free form."""
    if stage == "run" and key.split(".")[0] in ("defaults", "stages"):
        inner = key.split(".", 1 if key.startswith("defaults") else 2)[-1]
        return any(is_key(each, inner) for each in STAGE_CONFIGS)
    described = list(describe_keys(SETTINGS[stage]))
    return any(
        key == each.key
        or each.key.startswith(f"{key}.")
        or (each.accepts.startswith("mapping") and key.startswith(f"{each.key}."))
        for each in described
    )


def config_problems(
    stage: str, config: str | None, settings: Sequence[str], command: Command, document: Path
) -> Iterator[str]:
    """Whether the file is there, in the repository or as a block of the document, and loads with the settings."""
    if command.abbreviated or (config is not None and is_placeholder(config)):
        return
    if config is None:
        files: list[Path | None] = [None]
    else:
        files = [path for path in (ROOT / config, document.parent / config) if path.is_file()]
    if files:
        flaw = load_problem(stage, files[0], settings)
        yield from () if flaw is None else (flaw,)
    elif not is_written(document, stage, settings):
        yield f"{config} is not in the repository, and no block of the document is a configuration of {stage}"


def is_written(document: Path, stage: str, settings: Sequence[str]) -> bool:
    """Whether a YAML block of the document is a configuration of the stage with these settings."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "block.yaml"
        for block in blocks(document.read_text(encoding="utf-8"), "yaml"):
            file.write_text(block, encoding="utf-8")
            if load_problem(stage, file, settings) is None:
                return True
    return False


def load_problem(stage: str, file: Path | None, settings: Sequence[str]) -> str | None:
    try:
        if stage == "run":
            load_run_config(file, settings)
        elif stage in COMMAND_CONFIGS:
            load_command_config(stage, file, settings)
        else:
            load_stage_config(stage, file, settings)
    except ConfigError as error:
        return f"{stage}: {error}"
    return None


def tool_problems(name: str, rest: Sequence[str]) -> Iterator[str]:
    """The tool is there and knows the options, and the names (of benchmarks) that stand before them."""
    text = help_of_tool(name)
    if text is None:
        yield f"there is no {name}"
        return
    first_option = next((n for n, word in enumerate(rest) if word.startswith("-")), len(rest))
    asked = [*rest[:first_option], *(word for word in rest if word.startswith("--"))]
    for word in asked:
        if word != "..." and not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
            yield f"{name} knows no {word}"


def script_problems(kind: str, name: str, rest: Sequence[str], command: Command, document: Path) -> Iterator[str]:
    path = ROOT / name
    if not path.is_file():
        yield f"there is no {name}"
        return
    text = path.read_text(encoding="utf-8")
    if kind == "sbatch":
        yield from job_problems(text, command, document)
        return
    parts = re.search(r'^readonly ALL_PARTS="([\w ]+)"', text, re.MULTILINE)
    known = parts[1].split() if parts is not None else re.findall(r"--\w+", text)
    options = [word for word in rest if parts is not None or word.startswith("--")]
    yield from (f"{name} takes no {word}" for word in options if word not in known)


def job_problems(script: str, command: Command, document: Path) -> Iterator[str]:
    """`STAGE=... CONFIG=... EXTRA=... sbatch script`: variables that the script reads, stage, file and settings."""
    head = script.partition("\nset -uo pipefail")[0]
    for variable in command.environment:
        if re.search(rf"^#.*\b{variable}\b", head, re.MULTILINE) is None:
            yield f"the job script reads no {variable}"
    stage = command.environment.get("STAGE", "align")
    if stage not in (*STAGE_CONFIGS, "run"):
        yield f"STAGE={stage} is no stage"
        return
    settings = command.environment.get("EXTRA", "").split()
    yield from setting_problems(stage, settings)
    default = "examples/configs/align_6b.yaml" if stage == "align" else None
    config = command.environment.get("CONFIG", default)
    if config is not None:
        yield from config_problems(stage, config, settings, command, document)
    elif command.in_block:
        yield f"STAGE={stage} needs CONFIG"


def definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("document", PAGES, ids=name_of)
def test_links_and_paths_exist(document: Path) -> None:
    # test_extending.py applies the diffs, which may make files.
    text = re.sub(r"```diff\n.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")}
    missing = {link for link in links if not (document.parent / link).exists()}
    paths = set(re.findall(r"\b(?:exo_megatron|tests|tools|slurm|examples)/[\w./-]*\w", text))
    missing |= {path for path in paths if not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("document", PAGES, ids=name_of)
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


@each_document
def test_every_command_is_real(document: Path) -> None:
    problems = [
        f"{' '.join(command.words)}: {problem}"
        for command in commands(document.read_text(encoding="utf-8"))
        for problem in find_problems(command, document)
    ]
    assert not problems, "\n".join(["", *problems])


def test_commands_are_found() -> None:
    """The test above would pass where nothing is found."""
    counts = {name_of(path): len(list(commands(path.read_text(encoding="utf-8")))) for path in DOCUMENTS}
    assert counts["README.md"] >= 10
    assert counts["examples/README.md"] >= 10
    others = ("docs/benchmarks.md", "docs/config.md", "docs/conversion.md", "CONTRIBUTING.md")
    assert all(counts[name] >= 3 for name in others)


@pytest.mark.parametrize(
    "line",
    [
        "exo-megatron algn --config examples/configs/align_6b.yaml",
        "exo-megatron align --config examples/configs/none.yaml",
        "exo-megatron align --config examples/configs/align_6b.yaml loss.knd=dpo_rw",
        "exo-megatron align --config examples/configs/align_6b.yaml loss.kind=none",
        "exo-megatron align --config examples/configs/align_6b.yaml --verbose",
        "exo-megatron sft --config examples/configs/align_6b.yaml",
        "exo-megatron import hf=path/to/model",
        "exo-megatron verify hf=path/to/model",
        "exo-megatron verify hf=path/to/model checkpoint=checkpoints/base tensor=2",
        "exo-megatron run --config examples/configs/run.yaml stages.none.optimizer.lr=1e-5",
        "exo-megatron run --config examples/configs/run.yaml defaults.parallel.tensr=1",
        "torchrun --nproc-per-node 2 -m exo_megatron algn --config examples/configs/align_6b.yaml",
        "STAGE=sft CONFIG=sft.yaml sbatch slurm/exo_6b.sh",
        "STAGE=sft sbatch slurm/exo_6b.sh",
        "STAGE=train sbatch slurm/exo_6b.sh",
        "MODELL=x sbatch slurm/exo_6b.sh",
        "EXTRA='loss.knd=dpo_rw' sbatch --nodes=4 slurm/exo_6b.sh",
        "sbatch slurm/exo_7b.sh",
        "python tools/none.py",
        "python tools/convert_hf_to_megatron.py --hff x",
        "python -m tools.none",
        "python -m tools.bench none",
        "bash tests/run.sh lnt",
        "bash examples/quickstart/run.sh --outputs x",
        "bash tests/none.sh",
        "make all",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    """A check that cannot fail says nothing."""
    (command,) = split_line(line, in_block=True)
    assert list(find_problems(command, ROOT / "CHANGELOG.md"))


@pytest.mark.parametrize("document", BESIDES, ids=name_of)
def test_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    paths = set(re.findall(r"\b(?<![/.])(?:exo_megatron|tests|tools|slurm|examples)/[\w./-]*\w", text))
    assert not {path for path in paths if not (ROOT / path).exists()}


@each_document
def test_paths_of_documents_exist(document: Path) -> None:
    paths = set(re.findall(r"(?<![\w/.])docs/[\w./-]*\w", document.read_text(encoding="utf-8")))
    assert not {path for path in paths if not (ROOT / path).exists()}


@each_document
def test_links_lead_to_files_and_headings(document: Path) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        path = document.parent / name if name else document
        if name.startswith("http"):
            continue
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            missing.append(link)
    assert not missing


def anchors(text: str) -> set[str]:
    """What headings of a Markdown text are called in links."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def setup_names() -> dict[str, object]:
    """The names of setup.py, and in `setup` what it tells setuptools."""
    told: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", told.update)
        patch.chdir(ROOT)
        names = runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    return {**names, "setup": told}


@each_document
def test_extras_exist(document: Path, setup_names: dict[str, object]) -> None:
    """`.[dev,mpi]` and `exo-megatron[dev]`."""
    named = re.findall(r"(?:exo-megatron|(?<![\w.])\.)\[([a-z,]+)\]", document.read_text(encoding="utf-8"))
    extras = setup_names["EXTRAS"]
    assert isinstance(extras, dict)
    assert {extra for group in named for extra in group.split(",")} <= set(extras)


def test_the_index_of_examples_is_complete() -> None:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    files = {path.relative_to(ROOT / "examples") for path in (ROOT / "examples").rglob("*") if path.is_file()}
    wanted = {str(path) for path in files if path.suffix in (".py", ".yaml", ".sh") and path.name != "__init__.py"}
    assert wanted <= links


def test_pre_commit_runs_what_ci_runs() -> None:
    script = (ROOT / "tests" / "run.sh").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^ +(lint|format|types|imports)\) (.+) ;;$", script, re.MULTILINE))
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: hook["entry"] for repo in config["repos"] for hook in repo["hooks"]}
    assert len(parts) == 4
    assert hooks == parts


def test_the_licence_is_named_and_whole(setup_names: dict[str, object]) -> None:
    told = setup_names["setup"]
    assert isinstance(told, dict)
    assert told["license_expression"] == told["license"] == "Apache-2.0"
    assert told["license_files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 202
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_changelog_and_citation_know_the_version(setup_names: dict[str, object]) -> None:
    told = setup_names["setup"]
    assert isinstance(told, dict)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == told["version"]
    assert citation["license"] == told["license_expression"]
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert told["version"] in versions
