"""Comparison of a distributed checkpoint with an HF checkpoint.

The models' descriptions are compared, and every tensor bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from exo_megatron.conversion.exporting import ReadEntry
from exo_megatron.conversion.hf_reader import HfTensors
from exo_megatron.conversion.importing import hf_spec
from exo_megatron.conversion.rules import Entry, Family, Shape
from exo_megatron.models.spec import ModelSpec

Direction = Literal["import", "export"]
"""The conversion: "import" made the distributed checkpoint, "export" the HF checkpoint.

If types differ, values of the source are converted to the type of the result.
"""

_CHUNK = 2**24
"""Elements compared at once."""

_BITS = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class TensorDifference:
    """An HF tensor that differs from the checkpoint's.

    Attributes:
        name: HF's name.
        index: index of the first different element.
        hf: its value in HF.
        stored: its value in the checkpoint.
        elements: number of elements that differ.
        largest: largest |difference|.
    """

    name: str
    index: Shape
    hf: float
    stored: float
    elements: int
    largest: float

    def __str__(self) -> str:
        place = f"{self.name}[{', '.join(map(str, self.index))}]"
        return f"{place}: {self.hf!r} in HF, {self.stored!r} in the checkpoint; {self.elements:,} elements differ"


class Comparison:
    """An HF checkpoint and the tensors of a distributed one. Making it reads headers only.

    Attributes:
        spec: the model that the family reads from HF's config.json.
        problems: tensors that one side lacks, has in addition, or has in another shape, a line
            each.
        entries: entries that both sides have, for `differences`.
    """

    def __init__(self, hf: Path, stored: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        """Read the HF checkpoint's config and headers, and compare names and shapes.

        `stored` has global shape and type of the checkpoint's tensors by key, without optimizer
        state. Raises CheckpointError if HF's config.json or a file of weights cannot be read.
        """
        family, self.spec = hf_spec(hf)
        self._hf = HfTensors(hf, family)
        entries = [entry for rule in family.tensors(self.spec) for entry in rule.entries()]
        wrong_keys = dict(_wrong_keys(entries, stored))
        wrong_names = dict(_wrong_names(entries, self._hf, family, tied=self.spec.tied_embeddings))
        output, embedding = family.tied_output
        compared = self.spec.tied_embeddings and output in self._hf.tensors and output not in wrong_names
        self._repeats = {embedding: output} if compared else {}
        self.problems = [*wrong_keys.values(), *wrong_names.values()]
        self.entries = [e for e in entries if e.rule.key not in wrong_keys and not wrong_names.keys() & e.sources]
        self._types = {
            (self._hf.tensors[name].dtype, stored[e.rule.key][1]) for e in self.entries for name in e.sources
        }
        self.hf_dtypes = {hf for hf, _ in self._types}
        self.stored_dtypes = {ours for _, ours in self._types}

    @property
    def names(self) -> int:
        """Number of HF tensors of the entries."""
        return sum(len(entry.sources) for entry in self.entries)

    @property
    def parameters(self) -> int:
        """Number of elements of the entries."""
        return sum(math.prod(entry.rule.shape) for entry in self.entries)

    def rounded_to(self, made: Direction) -> list[str]:
        """List the types to which the conversion `made` rounded values of the source."""
        types = {pair if made == "import" else pair[::-1] for pair in self._types}
        return sorted({str(to).removeprefix("torch.") for source, to in types if torch.promote_types(source, to) != to})

    def differences(self, entry: Entry, read: ReadEntry, made: Direction) -> Iterator[TensorDifference]:
        """Yield the differences between one entry and HF's tensors.

        The entry, which `read` reads by key and index, is taken apart by the family's rule. The
        parts are compared with HF's tensors bit for bit, in the types of what was made.
        """
        parts = entry.rule.transform.split(read(entry.rule.key, entry.index))
        for name, part in zip(entry.sources, parts, strict=True):
            for each in (name, self._repeats[name]) if name in self._repeats else (name,):
                found = _compare(each, self._hf.read(each), part, made)
                if found is not None:
                    yield found


def spec_differences(hf: ModelSpec, stored: ModelSpec) -> list[str]:
    """List the fields in which two descriptions of a model differ, a line each."""
    ours, theirs = _flat(stored.model_dump()), _flat(hf.model_dump())
    absent = "nothing"
    return [
        f"{name}: {theirs.get(name, absent)!r} by HF's config.json, {ours.get(name, absent)!r} in model.json"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name, absent) != theirs.get(name, absent)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _wrong_keys(entries: list[Entry], stored: Mapping[str, tuple[Shape, torch.dtype]]) -> Iterator[tuple[str, str]]:
    """List keys of the checkpoint that are missing, of another shape or unknown, with messages."""
    expected = {entry.rule.key: entry.global_shape for entry in entries}
    for key, shape in expected.items():
        if key not in stored:
            yield key, f"{key} {list(shape)} is missing in the checkpoint"
        elif stored[key][0] != shape:
            yield (
                key,
                f"{key} has shape {list(stored[key][0])} in the checkpoint, and {list(shape)} by HF's config.json",
            )
    for key in sorted(stored.keys() - expected.keys()):
        yield key, f"{key} {list(stored[key][0])} is in the checkpoint, and this model has no such tensor"


def _wrong_names(entries: list[Entry], hf: HfTensors, family: Family, *, tied: bool) -> Iterator[tuple[str, str]]:
    """List names of HF tensors that are missing, of another shape or unknown, with messages."""
    expected = {name: shape for entry in entries for name, shape in entry.sources.items()}
    output, embedding = family.tied_output
    if tied and output in hf.tensors:
        expected[output] = expected[embedding]
    for name, shape in expected.items():
        if name not in hf.tensors:
            yield name, f"{name} {list(shape)} is missing in the HF checkpoint"
        elif hf.tensors[name].shape != shape:
            seen = list(hf.tensors[name].shape)
            yield name, f"{name} has shape {seen} in the HF checkpoint, and {list(shape)} by its config.json"
    for name in sorted(hf.tensors.keys() - expected.keys()):
        if not family.ignores(name):
            shape = hf.tensors[name].shape
            yield name, f"{name} {list(shape)} is in the HF checkpoint, and this model has no such tensor"


def _compare(name: str, hf: Tensor, stored: Tensor, made: Direction) -> TensorDifference | None:
    """Compare two tensors of one shape, some rows at a time."""
    step = max(1, _CHUNK // max(1, hf[:1].numel()))
    index: Shape | None = None
    values = (0.0, 0.0)
    elements, largest = 0, 0.0
    for start in range(0, hf.shape[0], step):
        a, b = _of_one_type(hf[start : start + step], stored[start : start + step], made)
        differs = a.view(_BITS[a.itemsize]) != b.view(_BITS[b.itemsize])
        count = int(differs.sum())
        if not count:
            continue
        elements += count
        largest = max(largest, float((a.double() - b.double()).abs().nan_to_num(nan=math.inf).max()))
        if index is None:
            first = tuple(int(at) for at in torch.unravel_index(differs.flatten().int().argmax(), differs.shape))
            index, values = (first[0] + start, *first[1:]), (float(a[first]), float(b[first]))
    return None if index is None else TensorDifference(name, index, *values, elements, largest)


def _of_one_type(hf: Tensor, stored: Tensor, made: Direction) -> tuple[Tensor, Tensor]:
    """Convert the source to the type of the result, as the conversion does."""
    if made == "import":
        return hf.to(stored.dtype).contiguous(), stored.contiguous()
    return hf.contiguous(), stored.to(hf.dtype).contiguous()
