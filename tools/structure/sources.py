"""The source files of a checkout and what they define."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = "exo_megatron"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(root: Path, *folders: str) -> list[Path]:
    """List the Python files of the package, or of these folders of the checkout."""
    return sorted(path for folder in folders or (PACKAGE,) for path in (root / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    """Parse a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path, root: Path) -> str:
    """Name the module of a file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
