"""The plan of an export: the HF tensors that the tensors of a distributed checkpoint become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exo_megatron.conversion.families import find_family
from exo_megatron.conversion.hf_writer import ExportEntry, Shard
from exo_megatron.conversion.importing import CHOICES, DtypeChoice
from exo_megatron.conversion.rules import Shape, TensorRule
from exo_megatron.errors import CheckpointError
from exo_megatron.models.spec import ModelSpec
from exo_megatron.utils.ahead import made_ahead

ReadEntry = Callable[[str, Shape], Tensor]
"""A function that reads a tensor of the checkpoint by key and index on its stacked axes."""


def plan_export(
    spec: ModelSpec,
    config: Mapping[str, Any],
    stored: Mapping[str, tuple[Shape, torch.dtype]],
    dtype: DtypeChoice,
    where: str,
) -> list[ExportEntry]:
    """Plan the entries to export, in the order of the family's table.

    Args:
        spec: the model of the checkpoint.
        config: the HF config.json kept with the checkpoint. It must describe the same model as
            `spec`.
        stored: global shape and type of the checkpoint's tensors by key, without optimizer state.
        dtype: type of the written weights; "keep" for the stored types.
        where: path of the config.json, for messages.

    Returns:
        The entries with the types of their HF tensors.

    Raises:
        CheckpointError: `config` describes another model, or a tensor is missing, has another
            shape, or is not the family's.
    """
    family = find_family(config, where)
    if family.read_config(config, where) != spec:
        raise CheckpointError(
            where,
            "describes another model than model.json beside it",
            expected="the config.json that the checkpoint was made from",
            fix="put it back",
        )
    rules = family.tensors(spec)
    _check_stored(rules, stored, where)
    return [
        ExportEntry(entry, stored[rule.key][1] if dtype == "keep" else CHOICES[dtype])
        for rule in rules
        for entry in rule.entries()
    ]


def hf_tensors(shard: Shard, read: ReadEntry) -> Iterator[Sequence[Tensor]]:
    """Yield the HF tensors of each entry of a shard, in order, contiguous, on the CPU.

    They are read in a thread, one entry ahead of its use.
    """
    return made_ahead((item.bytes, partial(_take_apart, item, read)) for item in shard.entries)


def config_dtype(entries: list[ExportEntry]) -> torch.dtype:
    """Return the type that config.json names: the one with the most bytes."""
    sizes: dict[torch.dtype, int] = {}
    for item in entries:
        sizes[item.dtype] = sizes.get(item.dtype, 0) + item.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _take_apart(item: ExportEntry, read: ReadEntry) -> Sequence[Tensor]:
    rule = item.entry.rule
    parts = rule.transform.split(read(rule.key, item.entry.index).to(item.dtype))
    return [part.contiguous() for part in parts]


def _check_stored(rules: tuple[TensorRule, ...], stored: Mapping[str, tuple[Shape, torch.dtype]], where: str) -> None:
    expected = {rule.key: rule.stack + rule.shape for rule in rules}
    for key, shape in expected.items():
        if key not in stored or stored[key][0] != shape:
            seen = f"of shape {list(stored[key][0])}" if key in stored else "missing"
            raise CheckpointError(
                where, f"{key} is {seen}", expected=f"shape {list(shape)}", fix="export a checkpoint of this model"
            )
    extra = sorted(stored.keys() - expected.keys())
    if extra:
        raise CheckpointError(
            where,
            f"the checkpoint holds {extra[0]}, which the model has not",
            expected="the tensors of the model and no others",
            fix="export a checkpoint of this model",
        )
