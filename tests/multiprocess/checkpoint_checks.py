"""What the ranks of test_checkpoint.py do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

from exo_megatron.checkpoint import save as saving
from exo_megatron.checkpoint.directory import resolve_checkpoint, tokenizer_path, weights_path
from exo_megatron.checkpoint.publish import staging_path
from exo_megatron.checkpoint.safety import verify_together
from exo_megatron.checkpoint.save import save_checkpoint
from exo_megatron.config.sections import ComputeConfig, ModelConfig, ParallelConfig
from exo_megatron.config.stages import ExportConfig, ImportConfig
from exo_megatron.conversion.importing import ImportPlan
from exo_megatron.errors import CheckpointError, ExoError
from exo_megatron.execution.policy import find_policy, load_policy
from exo_megatron.parallel.ending import failing_together
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.stages.export_hf import run_export
from exo_megatron.stages.import_hf import run_import


def convert(runtime: Runtime, *, hf: Path, checkpoint: Path, exported: Path) -> None:
    run_import(ImportConfig(hf=hf, output=checkpoint), runtime)
    run_export(ExportConfig(model=ModelConfig(checkpoint=checkpoint), output=exported), runtime)


def load_and_save(
    runtime: Runtime, *, source: Path, target: Path, tensor: int, pipeline: int
) -> dict[str, tuple[int, ...]]:
    """Load at a topology and save from it; shapes of this rank's parameters."""
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    with model_parallel(runtime, parallel, seed=1) as topology:
        policy = load_policy(find_policy(source, parallel, print), topology, ComputeConfig(precision="fp32"))
        save_checkpoint(
            target,
            policy.model.sharded_state_dict(),
            spec=policy.spec,
            hf_files=tokenizer_path(resolve_checkpoint(source)),
            step=4,
            kind="training",
            trainer_state={"step": 4},
            runtime=runtime,
        )
    return {name: tuple(parameter.shape) for name, parameter in policy.model.named_parameters()}


def words_of(work: Any) -> str:
    """What a collective action that must fail says on this rank."""
    try:
        work()
    except ExoError as error:
        return str(error)
    return "no error"


def fail_on_last_rank(runtime: Runtime) -> str:
    def work() -> None:
        with failing_together():
            if runtime.rank == runtime.world_size - 1:
                raise CheckpointError("here", "broken", expected="whole", fix="mend")

    return words_of(work)


def verify(runtime: Runtime, *, checkpoint: Path) -> str:
    return words_of(lambda: verify_together(checkpoint))


def read_fails_while_importing(runtime: Runtime, *, hf: Path, output: Path) -> str:
    """A tensor of rank 1's share turns out to be unreadable in the middle of the save."""
    produce = ImportPlan.produce

    def failing(plan: ImportPlan, key: str, offset: tuple[int, ...]) -> Tensor:
        if runtime.rank == 1:
            raise CheckpointError(str(hf), "is gone", expected="the file", fix="bring it back")
        return produce(plan, key, offset)

    ImportPlan.produce = failing  # type: ignore[method-assign]
    try:
        return words_of(lambda: run_import(ImportConfig(hf=hf, output=output), runtime))
    finally:
        ImportPlan.produce = produce  # type: ignore[method-assign]


def killed_while_saving(runtime: Runtime, *, source: Path, target: Path) -> None:
    """Rank 1 dies by SIGKILL after the tensors are written and before rank 0 knows their checksums."""

    def die(*args: object) -> None:
        assert (weights_path(staging_path(target)) / ".metadata").exists()
        os.kill(os.getpid(), signal.SIGKILL)

    if runtime.rank == 1:
        saving._gather_records = die  # type: ignore[assignment]
    load_and_save(runtime, source=source, target=target, tensor=1, pipeline=2)
