"""The plan of an import: the HF tensors that make each entry of the distributed checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from exo_megatron.conversion.families import find_family
from exo_megatron.conversion.hf_reader import HF_CONFIG_FILE, HfTensors, check_tensors, read_config
from exo_megatron.conversion.rules import Entry, Family, Shape
from exo_megatron.conversion.transforms import check_one_dtype
from exo_megatron.models.spec import ModelSpec

DtypeChoice = Literal["keep", "fp32", "bf16"]
CHOICES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ImportEntry:
    """An entry of the distributed checkpoint and the type in which it is stored."""

    entry: Entry
    dtype: torch.dtype

    @property
    def place(self) -> tuple[str, Shape, Shape, Shape]:
        """Key, sizes of its stacked axes, index on them, and shape of the entry."""
        return self.entry.rule.key, self.entry.rule.stack, self.entry.index, self.entry.rule.shape

    @property
    def bytes(self) -> int:
        """Size as stored."""
        return torch.Size(self.entry.rule.shape).numel() * self.dtype.itemsize


def hf_spec(directory: Path) -> tuple[Family, ModelSpec]:
    """Read the family and the model of an HF checkpoint from its config.json.

    Raises CheckpointError if it is missing, malformed, or not supported.
    """
    where = str(directory / HF_CONFIG_FILE)
    values = read_config(directory)
    family = find_family(values, where)
    return family, family.read_config(values, where)


class ImportPlan:
    """A checked HF checkpoint. Making it reads headers only; `produce` reads tensors."""

    def __init__(self, directory: Path, dtype: DtypeChoice) -> None:
        """Check the HF checkpoint and plan its entries.

        Raises CheckpointError for a config or a tensor that cannot be converted.
        """
        family, self.spec = hf_spec(directory)
        self._hf = HfTensors(directory, family)
        rules = family.tensors(self.spec)
        check_tensors(
            self._hf, [entry for rule in rules for entry in rule.entries()], family, tied=self.spec.tied_embeddings
        )
        self.entries: list[ImportEntry] = []
        for rule in rules:
            entries = list(rule.entries())
            stored = CHOICES[dtype] if dtype != "keep" else self._common_dtype(entries)
            self.entries += [ImportEntry(entry, stored) for entry in entries]
        self._by_place = {(item.entry.rule.key, item.entry.offset): item for item in self.entries}

    def produce(self, key: str, offset: Shape) -> Tensor:
        """Return the data of one entry, of its `stacked_shape` and stored type, on the CPU."""
        item = self._by_place[key, offset]
        parts = [self._hf.read(name) for name in item.entry.sources]
        joined = item.entry.rule.transform.join([part.to(item.dtype) for part in parts])
        return joined.reshape(item.entry.stacked_shape)

    def _common_dtype(self, entries: list[Entry]) -> torch.dtype:
        names = [name for entry in entries for name in entry.sources]
        return check_one_dtype(str(self._hf.directory), {name: self._hf.tensors[name].dtype for name in names})
