"""The form of a model family's table, which relates its HF config and tensors to ours."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from exo_megatron.conversion.transforms import Transform
from exo_megatron.models.spec import ModelSpec

Shape = tuple[int, ...]

SCORE = "score.weight"
"""HF's name of the head of every sequence classifier."""


@dataclass(frozen=True)
class TensorRule:
    """One key of the distributed checkpoint and the HF tensors of which it is made.

    Attributes:
        key: megatron-core's key.
        shape: shape of one entry.
        sources: HF names with their shapes; `{0}`, `{1}` stand for the indices of an entry on the
            stacked axes.
        transform: converts between the HF tensors and the entry.
        stack: sizes of the axes that the key has before `shape` (layers; layers and experts), ()
            for a tensor that stands alone.
    """

    key: str
    shape: Shape
    sources: tuple[tuple[str, Shape], ...]
    transform: Transform
    stack: Shape = ()

    def entries(self) -> Iterator[Entry]:
        """List one entry per index of the stacked axes."""
        for index in itertools.product(*(range(size) for size in self.stack)):
            yield Entry(self, index, {name.format(*index): shape for name, shape in self.sources})


@dataclass(frozen=True)
class Entry:
    """One slice of a key, which is read, converted and written at once."""

    rule: TensorRule
    index: Shape
    sources: Mapping[str, Shape]

    @property
    def global_shape(self) -> Shape:
        """Shape of the whole key."""
        return self.rule.stack + self.rule.shape

    @property
    def offset(self) -> Shape:
        """Index of the entry's first element in the whole key."""
        return self.index + tuple(0 for _ in self.rule.shape)

    @property
    def stacked_shape(self) -> Shape:
        """Shape of the entry as a part of the whole key."""
        return tuple(1 for _ in self.index) + self.rule.shape


@dataclass(frozen=True)
class Family:
    """A model family. One file in `families/` makes one, and `families/__init__.py` lists it.

    Attributes:
        model_type: the key of the same name in HF's config.json.
        architectures: architectures whose tensors the rules describe, the usual one first.
        read_config: reads a ModelSpec from the HF config; the path is for messages. Raises
            CheckpointError for values that are not supported.
        tensors: lists the rules for a model.
        base_prefix: prefix of HF's names of everything but the head. Published files of some models
            have the names without it.
        tied_output: names of the output layer and of the embedding, which are equal in checkpoints
            of tied models.
        ignored: HF tensors with nothing to convert (buffers that older versions of transformers
            saved).
    """

    model_type: str
    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], str], ModelSpec]
    tensors: Callable[[ModelSpec], tuple[TensorRule, ...]]
    base_prefix: str
    tied_output: tuple[str, str]
    ignored: tuple[re.Pattern[str], ...] = ()

    def full_name(self, name: str) -> str:
        """Return the full name of a tensor in a checkpoint whose names lack `base_prefix`."""
        return name if name in (self.tied_output[0], SCORE) else self.base_prefix + name

    def ignores(self, name: str) -> bool:
        """Tell whether a tensor of this name holds nothing to convert."""
        return any(pattern.fullmatch(name) for pattern in self.ignored)
