"""Functions that read a checkpoint into a model without running any code from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from exo_megatron.checkpoint.directory import TRAINER_FILE, read_manifest, read_spec, weights_path
from exo_megatron.checkpoint.dist_format import read_sharded, template_shapes
from exo_megatron.checkpoint.safety import (
    check_pickles,
    read_metadata,
    refuse_unsafe_environment,
    tensor_entries,
    verify_small_files,
    verify_together,
)
from exo_megatron.checkpoint.shard_reader import Records, read_records
from exo_megatron.checkpoint.tensors import OPTIMIZER_PREFIX
from exo_megatron.config.sections import ComputeConfig
from exo_megatron.errors import CheckpointError, DataError
from exo_megatron.models.policy import PolicyModel, build_policy
from exo_megatron.parallel.ending import failing_together
from exo_megatron.parallel.runtime import objects_group
from exo_megatron.parallel.topology import Topology
from exo_megatron.utils.files import read_json


def load_model(checkpoint: Path, topology: Topology, compute: ComputeConfig) -> PolicyModel:
    """Verify a checkpoint and load its model at this topology, in `compute.precision`.

    Collective over the world. checkpoint: the directory of the checkpoint itself, which may be one
    that is not yet in its place. Raises CheckpointError if a file is damaged, or if the tensors are
    not those of its model.json.
    """
    records = verify_but_records(checkpoint)
    with failing_together():
        spec = read_spec(checkpoint)
    model = build_policy(spec, topology, compute)
    template = model.sharded_state_dict()
    wanted = _all_keys(template)
    with failing_together():
        _check_no_more(checkpoint, wanted)
    load_module(model, load_sharded(checkpoint, template, records), str(checkpoint))
    return model


def verify_but_records(checkpoint: Path) -> Records | None:
    """Verify what `load_sharded` will not: all of a checkpoint, or all but the records of its tensors.

    Collective over the world. Returns the checksums of the records, for `load_sharded`; None if the
    checkpoint has none, because an earlier version made it: then all ranks together have read all
    of it. Raises CheckpointError, on all ranks, if a file is damaged.
    """
    with failing_together():
        records = read_records(checkpoint, read_manifest(checkpoint))
    if records is None:
        verify_together(checkpoint)
    else:
        verify_small_files(checkpoint)
    return records


def _all_keys(template: dict[str, Any]) -> set[str]:
    """Collect the tensor keys that any rank asks for: pipeline stages differ in them.

    Collective over the world.
    """
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, sorted(template_shapes(template)), group=objects_group())
    return {key for keys in gathered for key in keys}


def _check_no_more(checkpoint: Path, wanted: set[str]) -> None:
    """Raise CheckpointError for tensors that the model would silently lose, such as biases."""
    stored = tensor_entries(read_metadata(weights_path(checkpoint)))
    extra = sorted(key for key in stored if key not in wanted and not key.startswith(OPTIMIZER_PREFIX))
    if extra:
        raise CheckpointError(
            str(checkpoint),
            f"holds {extra[0]}, which the model of its model.json does not have",
            expected="the tensors of the model and no others",
            fix="convert the HF checkpoint again",
        )


def load_sharded(checkpoint: Path, sharded_state: dict[str, Any], records: Records | None) -> dict[str, Any]:
    """Fill a template of megatron-core sharded tensors and objects from a checkpoint.

    Collective over the world. A rank reads the records that its part of the template overlaps.

    Args:
        checkpoint: the directory of the checkpoint.
        sharded_state: result of `sharded_state_dict()` of a model (and of its optimizer) at the
            present topology, which may differ from the one that saved. Its tensors are filled in
            place, cast to their dtype.
        records: what `verify_but_records` returned; None to compare no checksums.

    Returns:
        The filled state dict: under the template's top-level keys, also the values that were not
            sharded when saved (the optimizer's parameter groups); without `_extra_state`.

    Raises:
        CheckpointError: before anything is loaded, if a tensor is missing or has another global
            shape, or if a pickled part calls for anything but tensors and plain values; on all
            ranks, if a record that some rank read is damaged.
    """
    weights = weights_path(checkpoint)
    with failing_together():
        _check(weights, template_shapes(sharded_state))
    with failing_together():
        loaded = _read(sharded_state, checkpoint, records)
    return {key: value for key, value in loaded.items() if key in sharded_state}


def _read(sharded_state: dict[str, Any], checkpoint: Path, records: Records | None) -> dict[str, Any]:
    try:
        return read_sharded(sharded_state, checkpoint, records)
    except CheckpointException as error:  # torch's: a BaseException with the failures of all ranks
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise _misfit(weights_path(checkpoint), cause) from error
    except (CheckpointingException, KeyError, OSError, RuntimeError, ValueError) as error:
        raise _misfit(weights_path(checkpoint), error) from error


def load_module(module: nn.Module, state: dict[str, Any], where: str) -> None:
    """Load a state dict, strictly except for `_extra_state`, which checkpoints do not hold."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state")]
    if missing or unexpected:
        raise CheckpointError(
            where,
            f"has no {', '.join(missing[:3])}" if missing else f"has the unknown {', '.join(unexpected[:3])}",
            expected="the tensors of the model and no others",
            fix="use a checkpoint of this model",
        )


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read the training loop's own state, as given to `save_checkpoint`.

    Raises CheckpointError if there is none.
    """
    path = checkpoint / TRAINER_FILE
    try:
        state: dict[str, Any] = read_json(path)
    except DataError as error:
        raise CheckpointError(
            str(path),
            error.problem,
            expected="a training checkpoint",
            fix="resume from a checkpoint of a training stage",
        ) from None
    return state


def _misfit(weights: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        str(weights),
        f"cannot be loaded ({' '.join(str(error).split())[:200]})",
        expected="a checkpoint with all that the model and its optimizer ask for",
        fix="load it with the version and settings that saved it, or start from another checkpoint",
    )


def _check(weights: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    refuse_unsafe_environment()
    metadata = read_metadata(weights)
    check_pickles(weights, metadata)
    _check_shapes(weights, metadata, wanted)


def _check_shapes(weights: Path, metadata: Metadata, wanted: dict[str, tuple[int, ...]]) -> None:
    stored = tensor_entries(metadata)
    for key, shape in wanted.items():
        if key not in stored:
            raise CheckpointError(
                str(weights),
                f"has no tensor {key}",
                expected=f"{key} of shape {list(shape)}",
                fix="use a checkpoint of this model",
            )
        if tuple(stored[key].size) != shape:
            raise CheckpointError(
                str(weights),
                f"{key} has shape {list(stored[key].size)}",
                expected=f"shape {list(shape)}",
                fix="use a checkpoint of this model (same vocabulary, sizes and number of layers)",
            )
