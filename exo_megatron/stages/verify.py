"""The `verify` command: comparison of model, tensors and logits of a conversion, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.checkpoint.directory import (
    HF_DIRECTORY,
    SPEC_FILE,
    read_manifest,
    read_spec,
    resolve_checkpoint,
    skipped_steps,
    tokenizer_path,
    weights_path,
)
from exo_megatron.checkpoint.safety import verify_together
from exo_megatron.checkpoint.tensors import StoredTensors
from exo_megatron.config.sections import ParallelConfig
from exo_megatron.config.stages import VerifyConfig
from exo_megatron.conversion.hf_reader import HF_CONFIG_FILE
from exo_megatron.conversion.importing import hf_spec
from exo_megatron.conversion.rules import Entry
from exo_megatron.conversion.verifying import Comparison, Direction, TensorDifference, spec_differences
from exo_megatron.errors import ExoError, TopologyError, VerificationFailed
from exo_megatron.models.policy import check_topology
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.ending import failing_together
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.stages.run import say
from exo_megatron.stages.verification import Check, render
from exo_megatron.stages.verify_logits import check_logits, read_examples
from exo_megatron.utils.progress import Progress


def verify(config: VerifyConfig, runtime: Runtime) -> int:
    """Compare, print the table and return the exit code. Collective over the world.

    0: everything that can be compared agrees. 1: something differs, or logits could not be compared
    for want of memory or of a transformers that knows the model.
    """
    with failing_together():
        checkpoint = resolve_checkpoint(config.checkpoint)
    for line in skipped_steps(config.checkpoint):
        say(runtime, line)
    checks = run_checks(config.model_copy(update={"checkpoint": checkpoint}), runtime)
    say(runtime, render(checks))
    return 0 if all(check.verdict in ("pass", "not comparable") for check in checks) else 1


def check_conversion(hf: Path, checkpoint: Path, output: Path, made: Direction, runtime: Runtime) -> None:
    """Verify the output of a conversion, with all ranks of the world, and print the table.

    Collective over the world. Logits are left out, as the table says, if they do not fit into
    memory or transformers cannot load the HF model.

    Args:
        hf, checkpoint: the two sides, one of which is new and not yet in its place `output`.
        output: the output of the conversion.
        made: direction of the conversion.
        runtime: the world.

    Raises:
        VerificationFailed: something differs.
    """
    with failing_together():
        spec = read_spec(checkpoint)
    cut = _fitting_cut(spec, runtime.world_size)
    checks = run_checks(VerifyConfig(hf=hf, checkpoint=checkpoint, parallel=cut, made=made), runtime)
    say(runtime, render(checks))
    failed = [check for check in checks if check.verdict == "FAIL"]
    if failed:
        raise VerificationFailed(
            str(output),
            f"the conversion differs from its source ({failed[0].name}: {failed[0].details[0]})",
            expected="the same model on both sides",
            fix="see the table above; nothing was written to the output",
        )


def run_checks(config: VerifyConfig, runtime: Runtime) -> list[Check]:
    """Run all checks, with the same result on every rank. Collective over the world.

    `config.checkpoint` is the directory of the checkpoint itself, which need not be in its place
    yet. Raises CheckpointError for what cannot be read or fails the checksums of its manifest,
    TopologyError if the model cannot be cut as asked, DataError for prompts that cannot be used.
    """
    checkpoint = config.checkpoint
    with failing_together():
        spec = read_spec(checkpoint)
    with failing_together():
        check_topology(spec, config.parallel)
    if not config.tensors_only:
        _check_processes(config.parallel, runtime.world_size)
    verify_together(checkpoint)
    if config.tensors_only:
        return _check_weights(config, spec, runtime).checks
    with model_parallel(runtime, config.parallel, seed=0) as topology:
        with failing_together():
            examples = read_examples(config.prompts, checkpoint, spec)
        weights = _check_weights(config, spec, runtime)
        logits = check_logits(config, weights.comparison, weights.made, topology, examples, runtime)
        return [*weights.checks, logits]


@dataclass(frozen=True)
class _Weights:
    """Checks of the description and the tensors, and the conversion's direction."""

    checks: list[Check]
    comparison: Comparison
    made: Direction


def _check_weights(config: VerifyConfig, spec: ModelSpec, runtime: Runtime) -> _Weights:
    checkpoint = config.checkpoint
    with failing_together():
        comparison = Comparison(config.hf, StoredTensors(weights_path(checkpoint)).of_model())
    with failing_together():
        description = _check_description(comparison, checkpoint, spec)
        made = _direction(config)
    return _Weights([description, _check_tensors(comparison, config, made, runtime)], comparison, made)


def _check_processes(cut: ParallelConfig, world_size: int) -> None:
    size = cut.processes
    if world_size % size:
        raise TopologyError(
            f"tensor {cut.tensor}, pipeline {cut.pipeline}, expert {cut.expert}",
            f"cut the model into {size} parts, which is no divisor of {world_size}, the number of processes",
            expected=f"{size} processes, or a multiple",
            fix=f"start it with torchrun --nproc-per-node {size}, srun or mpirun, or change the three sizes",
        )


def _fitting_cut(spec: ModelSpec, world_size: int) -> ParallelConfig:
    """Find the finest cut of the model for `world_size` ranks, tensor-parallel if possible."""
    sizes = [size for size in range(world_size, 0, -1) if world_size % size == 0]
    for size in sizes:
        for tensor in (each for each in sizes if size % each == 0):
            cut = ParallelConfig(tensor=tensor, pipeline=size // tensor)
            try:
                check_topology(spec, cut)
            except ExoError:
                continue
            return cut
    return ParallelConfig()


def _check_description(comparison: Comparison, checkpoint: Path, spec: ModelSpec) -> Check:
    """Compare model.json, and the config.json kept for the export, with the HF checkpoint."""
    details = [f"{SPEC_FILE}: {line}" for line in spec_differences(comparison.spec, spec)]
    _, kept = hf_spec(tokenizer_path(checkpoint))
    details += [f"{HF_DIRECTORY}/{HF_CONFIG_FILE}: {line}" for line in spec_differences(comparison.spec, kept)]
    return Check(
        "description",
        f"{SPEC_FILE}, {HF_DIRECTORY}/{HF_CONFIG_FILE}",
        str(len(details)),
        "FAIL" if details else "pass",
        tuple(details),
    )


def _direction(config: VerifyConfig) -> Direction:
    """Tell which side was made: as asked, else HF's if a training stage saved the checkpoint.

    Nothing in an HF checkpoint says whether it was exported. Trying both directions would call a
    damaged checkpoint whole whose difference disappears in the rounding of the wrong one.
    """
    if config.made is not None:
        return config.made
    return "export" if read_manifest(config.checkpoint).kind == "training" else "import"


def _check_tensors(comparison: Comparison, config: VerifyConfig, made: Direction, runtime: Runtime) -> Check:
    """Compare every tensor, the entries divided among the ranks. Collective over the world."""
    mine = comparison.entries[runtime.rank :: runtime.world_size]
    with failing_together():
        found = _differences(comparison, config.checkpoint, mine, made, show=runtime.is_main)
    differing = runtime.broadcast_items(runtime.gather_items(found) or [])
    details = [*comparison.problems, *map(str, differing)]
    if differing and config.made is None and made == "import" and comparison.hf_dtypes != comparison.stored_dtypes:
        details.insert(0, "types differ; fix: made=export if the HF checkpoint was exported from this one")
    rounded = comparison.rounded_to(made)
    equality = f", equal after rounding to {', '.join(rounded)}" if rounded else ""
    return Check(
        "tensors",
        f"{comparison.names} tensors ({made}{equality})",
        f"{max((each.largest for each in differing), default=0.0):.3g}",
        "FAIL" if details else "pass",
        tuple(details),
    )


def _differences(
    comparison: Comparison, checkpoint: Path, entries: Sequence[Entry], made: Direction, *, show: bool
) -> list[TensorDifference]:
    tensors = StoredTensors(weights_path(checkpoint))
    found: list[TensorDifference] = []
    with Progress("verify", len(entries), "entries", enabled=show) as progress:
        for entry in entries:
            found += comparison.differences(entry, tensors.read, made)
            progress.advance()
    return found
