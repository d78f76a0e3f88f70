"""One configuration class per stage, and the pipeline of stages that `run` executes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from exo_megatron.config.sections import (
    BatchConfig,
    ComputeConfig,
    DataConfig,
    FilePath,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PositiveInt,
    RewardConfig,
    SamplingConfig,
    SaveConfig,
    Section,
    Seed,
)


class StageConfig(Section):
    """What every stage has."""

    output: FilePath = Field(description="directory that the stage writes")
    seed: Seed = Field(default=0, description="of everything random in the stage")


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
    """Supervised fine-tuning on the chosen completion of each record."""

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

    candidates: FilePath = Field(
        description="output directory of `rollout`, a candidates JSONL file, or prompts with completions"
    )
    reward: RewardConfig
    log: LogConfig = LogConfig()


class AlignConfig(StageConfig):
    """EXO or DPO training on groups."""

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
        default=None, description="K that every group must have; default: any K >= 2, which may differ between groups"
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


class PipelineStage(Section):
    """One entry of a `run` file. `config` is checked against the stage's class before anything runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="unique; the default output is OUTPUT/NAME")
    stage: StageName = Field(description="which stage it is")
    config: dict[str, Any] = Field(default={}, description="keys of the stage")


class RunConfig(Section):
    """A pipeline: stages in order. `defaults` are merged under each stage that has such a section.

    Inside stage configs `${output}` stands for the run's output directory and `${NAME}` for the output
    directory of the stage called NAME.
    """

    output: FilePath = Field(description="directory that holds the outputs of the stages")
    seed: Seed = Field(default=0, description="of the stages that name none")
    defaults: dict[str, Any] = Field(default={}, description="sections merged under those of the stages")
    stages: list[PipelineStage] = Field(min_length=1, description="in the order in which they run")
