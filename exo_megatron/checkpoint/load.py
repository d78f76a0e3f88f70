"""Reading a checkpoint into a model, with nothing in it run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from exo_megatron.checkpoint.collective import together
from exo_megatron.checkpoint.directory import TRAINER_FILE, weights_path
from exo_megatron.checkpoint.dist_format import read_sharded, template_shapes
from exo_megatron.checkpoint.unpickling import check_pickles, read_metadata, refuse_unsafe_environment, tensor_entries
from exo_megatron.errors import CheckpointError, DataError
from exo_megatron.utils.files import read_json


def load_sharded(checkpoint: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Fill a template of megatron-core sharded tensors and objects from a checkpoint. Collective over the world.

    sharded_state: what `sharded_state_dict()` of a model (and of its optimizer) returned at the present topology,
        which may differ from the one that saved. Its tensors are filled in place, cast to their dtype.
    Returns the filled state dict: under the template's top-level keys, also the values that were not sharded when
        saved (the optimizer's parameter groups); without `_extra_state`.

    Raises CheckpointError before anything is loaded if a tensor is missing or has another global shape, or if a
    pickled part calls for anything but tensors and plain values. Checksums are for
    `integrity.verify_together`.
    """
    weights = weights_path(checkpoint)
    together(lambda: _check(weights, template_shapes(sharded_state)))
    try:
        loaded = read_sharded(sharded_state, weights)
    except (CheckpointingException, KeyError, OSError, RuntimeError) as error:
        raise _misfit(weights, error) from error
    except CheckpointException as error:  # torch's: a BaseException with the failures of all ranks
        raise _misfit(weights, next(iter(error.failures.values()))[0]) from error
    return {key: value for key, value in loaded.items() if key in sharded_state}


def load_module(module: nn.Module, state: dict[str, Any], where: str) -> None:
    """`module.load_state_dict`, strict but for `_extra_state`, which checkpoints do not hold."""
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
    """The training loop's own state, as given to `save_checkpoint`."""
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
