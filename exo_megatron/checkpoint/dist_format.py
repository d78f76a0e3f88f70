"""The only module that calls megatron-core's dist_checkpointing, of versions 0.16 to 0.19.

It hides their differences. 0.16 keeps values that are not sharded in `common.pt`, 0.19 in a sharded
object called `common_state` (it still reads `common.pt`). So with 0.19 `common.pt` is written too,
and either version loads the other's files. Both versions' own writers start helper processes (fork,
and a spawned manager that imports the main module again) and copy everything to host memory first;
torch's synchronous writer, used here, does neither.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.utils import _DistWrapper

from exo_megatron.checkpoint.directory import FileRecord, weights_path
from exo_megatron.checkpoint.safety import COMMON_FILE
from exo_megatron.checkpoint.shard_reader import Records, ShardReader
from exo_megatron.checkpoint.shard_writer import ShardWriter
from exo_megatron.errors import ExoError
from exo_megatron.parallel.ending import on_main
from exo_megatron.parallel.runtime import Runtime, objects_group

Producer = Callable[[str, tuple[int, ...]], Tensor]
"""Function that makes the data of a shard from its key and global offset."""


@dataclass(frozen=True)
class PlannedShard:
    """A piece of a tensor that is made only when it is written.

    Attributes:
        key: of the whole tensor, which has the axes `stack` and then those of `shape`.
        stack: sizes of the stacked axes.
        index: place on the stacked axes.
        shape, dtype: of the piece.
    """

    key: str
    stack: tuple[int, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


# 0.19 warns on every load that `common.pt` is the older form; both supported versions read it.
logging.getLogger("megatron.core.dist_checkpointing.strategies.common").setLevel(logging.ERROR)


class ProducerError(Exception):
    """An ExoError of a producer, as (where, problem, expected, fix) for other ranks."""


class _Planner(MCoreSavePlanner):  # type: ignore[misc]  # megatron-core has no types
    """Planner that gets the data of shards on the meta device from a producer at their turn."""

    def __init__(self, produce: Producer | None) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._produce = produce

    def transform_object(self, write_item: Any, object: Any) -> Any:
        """Return the data to write for a shard. torch calls it per shard, in the order of writing.

        torch drops the result after it is written.
        """
        if self._produce is None or not isinstance(object, Tensor) or object.device.type != "meta":
            return object
        index = write_item.index
        try:
            data = self._produce(index.fqn, tuple(index.offset))
        except ExoError as error:
            raise ProducerError(error.where, error.problem, error.expected, error.fix) from None
        if data.shape != object.shape or data.dtype != object.dtype:
            raise ValueError(
                f"{index.fqn} at {tuple(index.offset)}: produced {tuple(data.shape)} {data.dtype}, "
                f"planned {tuple(object.shape)} {object.dtype}"
            )
        return data.contiguous()


class _Snapshot(_Planner):
    """Planner that copies tensors to the memory of the host when the plan is settled."""

    def __init__(self, produce: Producer | None) -> None:
        super().__init__(produce)
        self._copies: dict[MetadataIndex, Tensor] = {}

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Copy what the plan writes. The host waits for the device once, at the end."""
        plan: SavePlan = super().finish_plan(new_plan)
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        self._copies = {item.index: _host_copy(super(_Snapshot, self).resolve_data(item)) for item in tensors}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the copy of a tensor, once: its memory is free when it is written."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._copies.pop(write_item.index)


def _host_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor.detach(), non_blocking=True)


class Writing:
    """The tensors of a checkpoint between the moment when all ranks have agreed who writes what, and their end."""

    def __init__(self, planner: SavePlanner, writer: ShardWriter, plan: SavePlan, metadata: Any) -> None:
        self._planner = planner
        self._writer = writer
        self._plan = plan
        self._metadata = metadata
        self._results: list[Any] = []

    def write(self) -> None:
        """Write this rank's tensors to its file, flushed to the disk. On this rank alone, in any thread.

        Raises OSError, ProducerError.
        """
        self._results = self._writer.write_data(self._plan, self._planner).value()

    def end(self, runtime: Runtime) -> dict[str, FileRecord]:
        """Write the index of all ranks' tensors. Returns name, checksum and size of this rank's file.

        Collective over the world, after `write` on all ranks.
        """
        results = runtime.gather_objects(self._results)
        on_main(runtime, lambda: self._writer.finish(self._metadata, results or []))
        return self._writer.written


class _Plan(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # megatron-core has no types
    """Strategy that only plans: `writing` is what is left to be done, one file per rank."""

    def __init__(self, planner: _Planner) -> None:
        super().__init__("torch_dist", 1)
        self._planner = planner
        self.writing: Writing | None = None

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Plan the writing of this rank's shards. Collective over the world.

        Raises torch's CheckpointException on every rank if any rank failed.
        """
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        state = mcore_to_pyt_state_dict(by_key, False)
        writer = ShardWriter(checkpoint_dir)
        ranks = _DistWrapper(objects_group(), True, 0)
        metadata: Any = None

        def of_rank() -> SavePlan:
            self._planner.set_up_planner(state, writer.storage_meta(), ranks.is_coordinator)
            writer.set_up_storage_writer(ranks.is_coordinator)
            return writer.prepare_local_plan(self._planner.create_local_plan())

        def of_all(plans: list[SavePlan]) -> list[SavePlan]:
            nonlocal metadata
            plans, metadata = self._planner.create_global_plan(plans)
            return writer.prepare_global_plan(plans)

        plan = self._planner.finish_plan(ranks.reduce_scatter("plan", of_rank, of_all))
        self.writing = Writing(self._planner, writer, plan, metadata)


def plan_writing(
    sharded_state: dict[str, Any], weights: Path, produce: Producer | None = None, *, snapshot: bool = False
) -> Writing:
    """Plan to save a sharded state dict into an existing empty directory. Collective over the world.

    Values that are not sharded must be the same on all ranks, and are written at once. Shards on
    the meta device are made by `produce` when they are written, in a thread of its own.

    snapshot: copy this rank's tensors, so that they may change before they are written.
    """
    strategy = _Plan(_Snapshot(produce) if snapshot else _Planner(produce))
    with _quiet():
        dist_checkpointing.save(without_extra_state(sharded_state), str(weights), sharded_strategy=strategy)
        if dist.get_rank() == 0 and not (weights / COMMON_FILE).exists():
            torch.save(dist_checkpointing.load_common_state_dict(str(weights)), weights / COMMON_FILE)
    if strategy.writing is None:
        raise RuntimeError("megatron-core has not called its strategy")
    return strategy.writing


def planned_state(shards: Iterable[PlannedShard]) -> dict[str, Any]:
    """Make a sharded state dict of shards on the meta device, each held by this rank alone."""
    state: dict[str, Any] = {}
    for shard in shards:
        place = ((axis, at, size) for axis, (at, size) in enumerate(zip(shard.index, shard.stack, strict=True)))
        data = torch.empty((*(1 for _ in shard.index), *shard.shape), dtype=shard.dtype, device="meta")
        name = ".".join([shard.key, *map(str, shard.index)])
        state[name] = ShardedTensor.from_rank_offsets(shard.key, data, *place)
    return state


class _Load(TorchDistLoadShardedStrategy):  # type: ignore[misc]  # megatron-core has no types
    """Strategy that reads with our reader. Nothing in it is collective."""

    def __init__(self, checkpoint: Path, records: Records | None) -> None:
        super().__init__()
        self._reader = ShardReader(checkpoint, records)

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *args: Any, **kwargs: Any) -> Any:
        """Fill the tensors of this rank's state in place; see megatron-core's strategy."""
        wanted = [tensor for tensor in nested_values(sharded_state_dict) if isinstance(tensor, ShardedTensor)]
        by_key, places, names = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        planner = MCoreLoadPlanner(shapes_validation_sharded_tensors=wanted)
        load(state, storage_reader=self._reader, planner=planner, no_dist=True)
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, places, names)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


def read_sharded(sharded_state: dict[str, Any], checkpoint: Path, records: Records | None) -> dict[str, Any]:
    """Fill a template from a checkpoint whose pickles have been checked.

    Every record that is read is compared with its checksum, if there are `records`. Collective over
    the world.
    """
    strategy = _Load(checkpoint, records)
    with _quiet():
        loaded: dict[str, Any] = dist_checkpointing.load(
            without_extra_state(sharded_state), str(weights_path(checkpoint)), sharded_strategy=strategy
        )
    return loaded


def without_extra_state(sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Copy a state's dicts and lists without `_extra_state` (Transformer Engine's fp8 scales)."""

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items() if not _is_extra_state(item)}
        if isinstance(value, list):
            return [copy(item) for item in value if not _is_extra_state(item)]
        return value

    copied: dict[str, Any] = copy(sharded_state)
    return copied


def template_shapes(sharded_state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Collect the global shapes of the tensors that a template asks for on this rank, by key.

    megatron-core lets the vocabulary of embeddings differ from the stored one
    (`allow_shape_mismatch`); we do not.
    """
    return {tensor.key: tuple(tensor.global_shape) for tensor in sharded_tensors(sharded_state)}


def local_bytes(sharded_state: dict[str, Any]) -> int:
    """Count the bytes of shards that this rank will write, as their main replica."""
    return sum(
        tensor.data.numel() * tensor.data.element_size()
        for tensor in sharded_tensors(sharded_state)
        if tensor.data is not None and is_main_replica(tensor.replica_id)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's warnings about the way megatron-core calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for text in ("torch.distributed is disabled", "The argument order of load has been changed"):
            warnings.filterwarnings("ignore", message=text, category=UserWarning)
        yield


def _is_extra_state(value: Any) -> bool:
    return isinstance(value, ShardedObject) and value.key.endswith("_extra_state")


def sharded_tensors(sharded_state: dict[str, Any]) -> list[Any]:
    """List megatron-core's sharded tensors of a state, with the factories (gated fc1) built."""
    leaves: list[Any] = []
    for value in nested_values(sharded_state):
        leaves += list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]
    return [leaf for leaf in leaves if isinstance(leaf, ShardedTensor)]
