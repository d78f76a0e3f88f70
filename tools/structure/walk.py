"""Walk of one parameter through the calls that pass it on."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tools.structure.sources import FUNCTIONS, module_name, parse, sources

GROUND = frozenset({"utils", "errors"})
"""Packages that all others use; a call of a file or progress function does not count as a stay."""


def climbs(root: Path) -> list[str]:
    """Walk `config` from `run_align` through the calls that get it or anything made of it, in
    source order.

    A climb is a step of the walk from a package to one of a higher layer. Each function is walked
    once; methods are not followed, because the text does not tell their class.
    """
    walk = Walk(root)
    walk.enter(walk.find("run_align"), {"config"})
    layers = layer_numbers(root)
    stays = [name for name in walk.stays if name.split(".")[1] not in GROUND]
    heights = [layers[name.split(".")[1]] for name in stays]
    steps = zip(stays, stays[1:], heights, heights[1:], strict=False)
    return [f"{before} -> {after}" for before, after, low, high in steps if high > low]


def layer_numbers(root: Path) -> dict[str, int]:
    """Map each package to the number of its layer in the contract of import-linter, from the
    lowest up.
    """
    contract = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(each["layers"] for each in contract["contracts"] if each["type"] == "layers")
    return {name.strip(): -place for place, names in enumerate(layers) for name in names.split("|")}


class Walk:
    """Walk of a parameter. stays: modules in the order in which calls take it there."""

    def __init__(self, root: Path) -> None:
        self.stays: list[str] = []
        self._passed: set[tuple[str, str]] = set()
        trees = {module_name(path, root): parse(path) for path in sources(root)}
        self._imports = {module: dict(imported_names(tree)) for module, tree in trees.items()}
        self._definitions = {
            (module, node.name): node
            for module, tree in trees.items()
            for node in tree.body
            if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        }

    def find(self, name: str) -> tuple[str, ast.FunctionDef]:
        """Find the one function of this name."""
        (found,) = [
            (module, node)
            for (module, defined), node in self._definitions.items()
            if defined == name and isinstance(node, ast.FunctionDef)
        ]
        return found

    def enter(self, place: tuple[str, ast.FunctionDef], carried: set[str]) -> None:
        """Enter a function whose parameters `carried` hold the walked value or what was made of
        it.
        """
        module, function = place
        if not self.stays or self.stays[-1] != module:
            self.stays.append(module)
        if (module, function.name) in self._passed:
            return
        self._passed.add((module, function.name))
        names = set(carried)
        for node in in_order(function):
            if isinstance(node, ast.Call):
                callee = self._resolve(module, node.func)
                given = parameters_given(node, callee[1], names) if callee else set()
                if callee and given:
                    self.enter(callee, given)
            names |= names_made(node, names)

    def _resolve(self, module: str, function: ast.expr) -> tuple[str, ast.FunctionDef] | None:
        """Find the function, or the __init__ of the class, that a plain name refers to."""
        if not isinstance(function, ast.Name):
            return None
        target = self._imports[module].get(function.id, (module, function.id))
        node = self._definitions.get(target)
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            node = next((each for each in methods if each.name == "__init__"), None)
        return (target[0], node) if isinstance(node, ast.FunctionDef) else None


def imported_names(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """List the names that a module imports: the name in it, and the module and name of its
    definition.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)


def in_order(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """List the nodes of a function approximately in the order of evaluation: the parts of a node
    come before it.
    """
    for statement in function.body:
        yield from post_order(statement)


def post_order(node: ast.AST) -> Iterator[ast.AST]:
    """List a node after all nodes in it; in a block, what it iterates or enters comes first."""
    for name in ("iter", "items", "test"):
        part = vars(node).get(name)
        for each in part if isinstance(part, list) else [part] if isinstance(part, ast.AST) else []:
            yield from post_order(each)
    if isinstance(node, ast.For | ast.With):
        yield node  # its target is known inside the block
    for name, value in ast.iter_fields(node):
        if name not in ("iter", "items", "test"):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.AST):
                    yield from post_order(each)
    yield node


def names_made(node: ast.AST, names: set[str]) -> set[str]:
    """List the names that a node assigns to something made of one of `names`."""
    pairs: list[tuple[ast.AST, list[ast.expr]]] = []
    if isinstance(node, ast.Assign):
        pairs = [(node.value, node.targets)]
    elif isinstance(node, ast.For | ast.comprehension):
        pairs = [(node.iter, [node.target])]
    elif isinstance(node, ast.With):
        pairs = [(item.context_expr, [item.optional_vars]) for item in node.items if item.optional_vars is not None]
    return {
        each.id
        for source, targets in pairs
        if mentions(source, names)
        for target in targets
        for each in ast.walk(target)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }


def mentions(node: ast.AST, names: set[str]) -> bool:
    """Tell whether one of the names occurs in an expression."""
    return any(isinstance(each, ast.Name) and each.id in names for each in ast.walk(node))


def parameters_given(call: ast.Call, function: ast.FunctionDef, names: set[str]) -> set[str]:
    """List the parameters of the callee that get something made of one of the names."""
    parameters = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    parameters = [each for each in parameters if each not in ("self", "cls")]
    given = {parameter for parameter, value in zip(parameters, call.args, strict=False) if mentions(value, names)}
    return given | {each.arg for each in call.keywords if each.arg is not None and mentions(each.value, names)}
