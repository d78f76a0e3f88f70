"""The files of an HF checkpoint that are copied with a model, such as config and tokenizer."""

from __future__ import annotations

from pathlib import Path

from exo_megatron.errors import CheckpointError

_SUFFIXES = frozenset({".json", ".jinja", ".model", ".tiktoken", ".txt"})
_NAMES = frozenset({"LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md"})
_DIRECTORIES = frozenset({"additional_chat_templates"})
_OURS = frozenset(
    {"exo_export.json", "manifest.json", "model.json", "stage.json", "stage-started.json", "trainer.json"}
)


def hf_file_names(source: Path) -> list[str]:
    """List the relative paths of the files to copy: no weights, weight index or Python code."""
    paths = [path for path in source.iterdir() if path.is_file()]
    for name in _DIRECTORIES:
        paths += [path for path in (source / name).glob("*") if path.is_file()]
    return sorted(path.relative_to(source).as_posix() for path in paths if _travels(path))


def check_hf_files(source: Path) -> None:
    """Raise CheckpointError if there is no config.json."""
    if not (source / "config.json").is_file():
        raise CheckpointError(
            str(source), "has no config.json", expected="an HF checkpoint's files", fix="add the model's config.json"
        )


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy these files to the directory `target`, which is made.

    Raises CheckpointError for a file that cannot be read, and OSError for one that cannot be
    written.
    """
    for name in hf_file_names(source):
        data = _read(source / name)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            str(path),
            f"cannot be read ({error.strerror or error})",
            expected="a readable file of the HF checkpoint",
            fix="check its permissions, copy it again, or move it away",
        ) from None


def _travels(path: Path) -> bool:
    if path.name in _NAMES:
        return True
    return path.suffix in _SUFFIXES and not path.name.endswith(".index.json") and path.name not in _OURS
