"""The `import` stage: HF checkpoint to distributed checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from exo_megatron.checkpoint.dist_format import PlannedShard, planned_state
from exo_megatron.checkpoint.save import save_checkpoint
from exo_megatron.config.stages import ImportConfig
from exo_megatron.conversion.importing import ImportEntry, ImportPlan
from exo_megatron.conversion.meter import ByteMeter, total_bytes
from exo_megatron.data.tokenizer import load_tokenizer
from exo_megatron.errors import DataError
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.ending import failing_together
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.run import say
from exo_megatron.stages.verify import check_conversion

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def run_import(config: ImportConfig, runtime: Runtime) -> None:
    """Convert the HF checkpoint `config.hf` to a distributed checkpoint in `config.output`.

    Collective over the world. The ranks divide the tensors, and each holds one at a time. Raises
    CheckpointError for what cannot be converted, before anything is written, and for an output
    directory that holds something else; VerificationFailed with `verify`, and the output is then
    not moved into its place.
    """
    with failing_together():
        plan = ImportPlan(config.hf, config.dtype)
    with failing_together():
        notes = check_tokenizer_files(config.hf, plan.spec) if runtime.is_main else []
    for note in notes:
        say(runtime, note)
    mine = _share(plan.entries, runtime)
    meter = ByteMeter("import", total_bytes(mine), total_bytes(plan.entries), enabled=runtime.is_main)

    def produce(key: str, offset: tuple[int, ...]) -> Tensor:
        data = plan.produce(key, offset)
        meter.count(data.nbytes)
        return data

    def inspect(made: Path) -> None:
        meter.close()
        if config.verify:
            check_conversion(config.hf, made, config.output, "import", runtime)

    save_checkpoint(
        config.output,
        planned_state(PlannedShard(*item.place, item.dtype) for item in mine),
        spec=plan.spec,
        hf_files=config.hf,
        step=None,
        kind="model",
        trainer_state=None,
        runtime=runtime,
        produce=produce,
        inspect=inspect,
    )


def _share(entries: Sequence[ImportEntry], runtime: Runtime) -> list[ImportEntry]:
    """List this rank's entries: consecutive ones, about as many bytes for each rank."""
    total = sum(item.bytes for item in entries)
    mine: list[ImportEntry] = []
    before = 0
    for item in entries:
        if before * runtime.world_size // total == runtime.rank:
            mine.append(item)
        before += item.bytes
    return mine


def check_tokenizer_files(hf: Path, spec: ModelSpec) -> list[str]:
    """List notes for the user about a tokenizer that is absent or unusable; empty if all is well.

    Weights without a tokenizer are converted, and those of models whose tokenizer names special
    tokens (of images, say) that they lack. Raises DataError if ordinary text can have ids that the
    model lacks.
    """
    if not any((hf / name).is_file() for name in _TOKENIZER_FILES):
        return [f"note: {hf} has no tokenizer; stages that read text need one in data.tokenizer"]
    try:
        tokenizer = load_tokenizer(hf)
    except DataError as error:
        return [f"note: the tokenizer of {hf} is copied but cannot be used ({error.problem}); give data.tokenizer"]
    if tokenizer.fitted_to(spec.vocab_size).vocab_size < tokenizer.vocab_size:
        return [
            f"note: the tokenizer of {hf} has special tokens from id {spec.vocab_size} on, which the model lacks; "
            "a text that spells one is refused"
        ]
    return []
