"""Counts in the source text: imports, words, names and docstrings."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tools.structure.sources import FUNCTIONS, PACKAGE, module_name, parse, sources

WH_WORDS = frozenset({"what", "which", "who", "whose", "where", "when", "why", "how", "whether", "if"})
PREPOSITIONS = frozenset((Path(__file__).parent / "prepositions.txt").read_text(encoding="utf-8").split())
VERBS = frozenset((Path(__file__).parent / "verbs.txt").read_text(encoding="utf-8").split())
"""Verbs with which the docstring of a function begins.

A verb that is missing in the list counts as none: add it.
"""

DOCUMENTED = (*FUNCTIONS, ast.ClassDef, ast.Module)
SEVERAL_TIMES = frozenset({"main", "FAMILY"})
"""Names that are defined in several modules on purpose: entries of programs, and the one table
of each model family.
"""


def function_level_imports(root: Path) -> Iterator[str]:
    """Find imports inside functions of `cli/`."""
    for path in sources(root, f"{PACKAGE}/cli"):
        for function in (node for node in ast.walk(parse(path)) if isinstance(node, FUNCTIONS)):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield f"{path.relative_to(root)}:{node.lineno}"


def rows(root: Path) -> Iterator[str]:
    """Find identifiers with the word "row", each as often as it occurs."""
    for path in sources(root):
        with tokenize.open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.type == tokenize.NAME and {"row", "rows"} & set(words(token.string)):
                    yield f"{path.relative_to(root)}:{token.start[0]} {token.string}"


def words(identifier: str) -> list[str]:
    """Split an identifier into its words, in lower case."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", identifier)
    return [part.lower() for part in parts]


def defined_twice(root: Path) -> Iterator[str]:
    """Find public classes, functions and constants that several modules define under one name."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sources(root):
        for name in public_definitions(parse(path)):
            places[name].append(str(path.relative_to(root)))
    for name, files in sorted(places.items()):
        if len(files) > 1 and name not in SEVERAL_TIMES:
            yield f"{name}: {', '.join(files)}"


def public_definitions(module: ast.Module) -> Iterator[str]:
    """List the names that a module defines at its top, without those that begin with an
    underscore.
    """
    for node in module.body:
        names: list[str] = []
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign) and "TypeVar(" not in ast.unparse(node.value):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


def docstrings(root: Path) -> Iterator[tuple[str, ast.AST, str]]:
    """List all docstrings with their places."""
    for path in sources(root):
        for node in ast.walk(parse(path)):
            if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
                name = "module" if isinstance(node, ast.Module) else node.name
                line = 1 if isinstance(node, ast.Module) else node.lineno
                yield f"{path.relative_to(root)}:{line} {name}", node, text


def without_a_verb(root: Path) -> Iterator[str]:
    """Find docstrings of functions and methods that do not begin with a verb.

    Properties are described like attributes, by what they are. "See NAME" points to the
    description.
    """
    for place, node, text in docstrings(root):
        if isinstance(node, FUNCTIONS) and not is_property(node) and not begins_with_a_verb(text):
            yield f"{place}: {text.splitlines()[0]}"


def bare_phrases(root: Path) -> Iterator[str]:
    """Find docstrings of modules, classes and properties that are a wh-clause or begin with a
    preposition.
    """
    for place, node, text in docstrings(root):
        if not isinstance(node, FUNCTIONS) or is_property(node):
            first = re.match(r"[A-Za-z]+", text)
            if first and first[0].lower() in WH_WORDS | PREPOSITIONS:
                yield f"{place}: {text.splitlines()[0]}"


def is_property(node: ast.AST) -> bool:
    """Tell whether a function is a property, which is read like an attribute."""
    return isinstance(node, FUNCTIONS) and any("property" in ast.unparse(each) for each in node.decorator_list)


def begins_with_a_verb(text: str) -> bool:
    """Tell whether the first word is a verb, plain or in the third person."""
    first = re.match(r"[A-Za-z]+", text)
    if first is None:
        return False
    word = first[0].lower()
    stems = {word, word.removesuffix("s"), word.removesuffix("es"), f"{word.removesuffix('ies')}y"}
    return word == "see" or not stems.isdisjoint(VERBS)


def import_circles(root: Path) -> Iterator[str]:
    """Find files that import each other in a circle, imports inside functions included."""
    modules = {module_name(path, root): path for path in sources(root)}
    imports = {name: imported_modules(path, modules) - {name} for name, path in modules.items()}
    for name in modules:
        if name in reachable(name, imports):
            yield name


def imported_modules(path: Path, modules: dict[str, Path]) -> set[str]:
    """List the modules of the package that a file imports."""
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= modules.keys() else {node.module, *names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules.keys()


def reachable(name: str, imports: dict[str, set[str]]) -> set[str]:
    """List the modules that a module imports, directly or through others."""
    seen: set[str] = set()
    waiting = list(imports[name])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(imports[module])
    return seen


def test_functions(root: Path) -> Iterator[str]:
    """Find test functions."""
    for path in sources(root, "tests"):
        for node in ast.walk(parse(path)):
            if isinstance(node, FUNCTIONS) and node.name.startswith("test_"):
                yield f"{path.relative_to(root)}:{node.lineno} {node.name}"


def longest_file(root: Path) -> int:
    """Count the lines of the longest source file of the package, the tools and the examples."""
    files = sources(root, PACKAGE, "tools", "examples")
    return max(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def longest_function(root: Path) -> int:
    """Count the lines of the longest function there."""
    return max(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in sources(root, PACKAGE, "tools", "examples")
        for node in ast.walk(parse(path))
        if isinstance(node, FUNCTIONS)
    )
