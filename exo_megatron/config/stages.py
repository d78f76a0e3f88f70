"""One configuration class per stage, and the workflow of stages that `run` executes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from exo_megatron.config.sections import (
    BatchConfig,
    CandidatesDataConfig,
    ComputeConfig,
    DataConfig,
    FilePath,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PositiveFloat,
    PositiveInt,
    RewardConfig,
    RuntimeConfig,
    SamplingConfig,
    SaveConfig,
    Section,
    Seed,
)


class StageConfig(Section):
    """The settings that every stage has."""

    places = frozenset({"runtime"})

    output: FilePath = Field(description="directory that the stage writes")
    seed: Seed = Field(default=0, description="of everything random in the stage")
    runtime: RuntimeConfig = RuntimeConfig()


class ImportConfig(StageConfig):
    """HF checkpoint directory -> distributed checkpoint."""

    hf: FilePath = Field(description="HF checkpoint directory (safetensors)")
    dtype: Literal["keep", "fp32", "bf16"] = Field(default="keep", description="type of the stored weights")
    verify: bool = Field(default=False, description="compare with the HF checkpoint before the output is put in place")


class ExportConfig(StageConfig):
    """Distributed checkpoint -> HF checkpoint directory."""

    model: ModelConfig
    dtype: Literal["keep", "fp32", "bf16"] = Field(default="keep", description="type of the written weights")
    verify: bool = Field(default=False, description="compare with the checkpoint before the output is put in place")


class SftConfig(StageConfig):
    """Supervised fine-tuning on the chosen candidate of each record."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    compute: ComputeConfig = ComputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    batch: BatchConfig = BatchConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()


class RolloutConfig(StageConfig):
    """K candidates per prompt from one policy."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    compute: ComputeConfig = ComputeConfig()
    sampling: SamplingConfig = SamplingConfig()
    log: LogConfig = LogConfig()


class ScoreConfig(StageConfig):
    """One reward per candidate."""

    added_later = frozenset({"data"})

    candidates: FilePath = Field(
        description="output directory of `rollout`, a candidates JSONL file, or prompts with completions"
    )
    data: CandidatesDataConfig = CandidatesDataConfig()
    reward: RewardConfig
    log: LogConfig = LogConfig()


PairRule = Literal["two_draws", "best_and_worst"]
TieRule = Literal["error", "skip"]


class AlignConfig(StageConfig):
    """Preference optimisation on groups: EXO, DPO, IPO or a loss of your own."""

    added_later = frozenset({"pairs", "ties"})

    model: ModelConfig
    reference: ModelConfig | None = Field(default=None, description="default: the checkpoint that training starts from")
    reference_logprobs: Literal["stored", "computed", "live"] = Field(
        default="stored",
        description="those of the rollout, where the data have them; computed once before the first step; "
        "by a reference model in every step",
    )
    data: DataConfig
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    compute: ComputeConfig = ComputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
    candidates: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="K of every group: the first K candidates of a record; default: all, which may differ in number",
    )
    pairs: PairRule = Field(
        default="two_draws",
        description="of rewarded candidates, a preference loss compares the first two; or best and worst of all",
    )
    ties: TieRule = Field(
        default="error", description="pairs without a preference (equal rewards, equal texts): an error; left out"
    )


class EvaluateConfig(StageConfig):
    """Mean reward and sequence-level KL to the reference policy of one or more checkpoints."""

    models: dict[str, FilePath] = Field(
        min_length=1, description="name -> checkpoint, or a training output (every step in it)"
    )
    reference: ModelConfig
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig
    parallel: ParallelConfig = ParallelConfig()
    compute: ComputeConfig = ComputeConfig()
    log: LogConfig = LogConfig()
    sample_texts: PositiveInt = Field(default=4, description="prompts whose samples are shown in the report")


class VerifyConfig(Section):
    """Comparison of an HF checkpoint with a distributed one that was converted from it or to it."""

    hf: FilePath = Field(description="directory of the HF checkpoint (safetensors)")
    checkpoint: FilePath = Field(description="distributed checkpoint, or output of a training stage")
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    prompts: FilePath | None = Field(
        default=None,
        description="JSONL (prompt, and completions if any) or a prompt in every line; default: built-in ones",
    )
    tolerance: PositiveFloat = Field(
        default=1e-4, description="of logits: largest difference, times the largest |logit| if that is above 1"
    )
    tensors_only: bool = Field(default=False, description="do not run the models")
    made: Literal["import", "export"] | None = Field(
        default=None,
        description="which side was made from the other, which matters where types differ; "
        "default: export for a checkpoint that a training stage saved, else import",
    )


class PicklesConfig(Section):
    """HF checkpoint with pickled weights -> the same checkpoint with safetensors."""

    hf: FilePath = Field(description="directory with config.json and pytorch_model*.bin")
    output: FilePath = Field(description="directory to be made, or empty")


CONFIG_FILE = "config.yaml"
STARTED_FILE = "stage-started.json"
COMPLETE_FILE = "stage.json"
STAGE_FILES = frozenset({CONFIG_FILE, STARTED_FILE, COMPLETE_FILE})
"""Files of every stage: its resolved configuration, and the marks that it started and completed."""

LOCK_FILE = ".exo-megatron.lock"
"""File beside them while a run is alive."""

CANDIDATES_DIRECTORY = "candidates"
"""Directory of the shards in the output of `rollout` and `score`."""

CANDIDATES_FILE = "candidates.jsonl"
"""A single file of candidates. In the output of a stage the name stands for its shards; a link, if there is one."""


def status_directory(config: StageConfig) -> Path:
    """Return the directory of a stage's STAGE_FILES: its output, or beside it for an export.

    The output of an export holds only files that belong on a hub.
    """
    if not isinstance(config, ExportConfig):
        return config.output
    output = Path(os.path.abspath(config.output))  # `.` has no name
    return output.with_name(f".{output.name}.exo-megatron")


StageName = Literal["import", "sft", "rollout", "score", "align", "evaluate", "export"]

STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "import": ImportConfig,
    "sft": SftConfig,
    "rollout": RolloutConfig,
    "score": ScoreConfig,
    "align": AlignConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}


COMMAND_CONFIGS: dict[str, type[Section]] = {"verify": VerifyConfig, "pickles": PicklesConfig}
"""Commands that have settings but are not stages of a workflow."""


class WorkflowStage(Section):
    """One entry of a `run` file.

    `config` is checked against the stage's class before anything runs.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="unique; the default output is OUTPUT/NAME")
    stage: StageName = Field(description="which stage it is")
    config: dict[str, Any] = Field(default={}, description="keys of the stage")


class RunConfig(Section):
    """A workflow: stages in order. `defaults` are merged under each stage that has such a section.

    In the stages' configurations `${output}` stands for the output directory of the workflow, and
    `${NAME}` for that of the stage called NAME.
    """

    output: FilePath = Field(description="directory that holds the outputs of the stages")
    seed: Seed = Field(default=0, description="of the stages that name none")
    runtime: RuntimeConfig = RuntimeConfig()
    defaults: dict[str, Any] = Field(default={}, description="sections merged under those of the stages")
    stages: list[WorkflowStage] = Field(min_length=1, description="in the order in which they run")
