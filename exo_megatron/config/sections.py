"""Sections shared by the configurations of several stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ParallelConfig(Section):
    """How one model copy is cut; the rest of the world is data parallel."""

    tensor: PositiveInt = Field(1, description="tensor-parallel size")
    pipeline: PositiveInt = Field(1, description="pipeline-parallel size")
    sequence: bool = Field(True, description="sequence parallelism, in effect where tensor > 1")


class ComputeConfig(Section):
    """Arithmetic and memory."""

    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations recomputed in the backward pass: none, core attention, whole layers"
    )
    max_tokens_per_microbatch: PositiveInt = Field(8192, description="tokens in one packed row")
    logprob_chunk_rows: PositiveInt = Field(1024, description="hidden rows projected onto the vocabulary at once")


class ModelConfig(Section):
    """Where a model comes from."""

    checkpoint: Path = Field(description="distributed checkpoint, or a stage's output directory (newest complete step)")


class DataConfig(Section):
    """Records in one of the formats of docs: prompt+chosen, prompt+chosen+rejected, prompt+completions(+rewards)."""

    path: str = Field(description="JSONL file, directory written by an earlier stage, local or hub `datasets` name")
    split: str = Field("train", description="split, where `path` names a `datasets` data set")
    tokenizer: Path | None = Field(None, description="tokenizer directory or .model file; default: the checkpoint's own")
    max_prompt_tokens: PositiveInt = 512
    max_completion_tokens: PositiveInt = 512
    limit: PositiveInt | None = Field(None, description="use only the first N records")


class OptimizerConfig(Section):
    """Adam with megatron-core's distributed optimizer, and the learning-rate schedule."""

    lr: PositiveFloat = 1e-6
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0 turns clipping off")
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 0
    min_lr_ratio: Fraction = Field(0.0, description="learning rate at the last step, as a share of lr")


class BatchConfig(Section):
    """How much one optimizer step sees and how long training lasts."""

    groups: PositiveInt = Field(64, description="groups (prompts) per optimizer step, over all data-parallel ranks")
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = Field(None, description="stop after this many steps if the epochs last longer")


class SaveConfig(Section):
    """Checkpoints of a run."""

    interval: PositiveInt | None = Field(None, description="save every N steps; default: only at the end")
    keep: Annotated[int, Field(ge=2)] = Field(2, description="complete checkpoints kept; older ones are removed")
    all_steps: bool = Field(False, description="keep every checkpoint, for reward/KL curves")


class LogConfig(Section):
    """Metrics: JSONL and TensorBoard under the output directory, and a progress line on rank 0."""

    interval: PositiveInt = 1
    tensorboard: bool = True


class SamplingConfig(Section):
    """How candidates are drawn."""

    candidates: PositiveInt = Field(4, description="K, candidates per prompt")
    temperature: PositiveFloat = Field(0.8, description="tau; logits are divided by it")
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: PositiveInt = 128
    max_active_candidates: PositiveInt = Field(256, description="candidates decoded at once by one data-parallel rank")


class RewardConfig(Section):
    """Where rewards come from."""

    kind: Literal["function", "hf_classifier"] = "function"
    function: str | None = Field(None, description="package.module:name, called with (prompts, completions)")
    path: Path | None = Field(None, description="local HF sequence classifier (safetensors)")
    label: NonNegativeInt | None = Field(None, description="class whose log-odds are the reward; default: one output")
    batch_size: PositiveInt = 32


class LossConfig(Section):
    """The alignment objective, in the paper's symbols."""

    kind: Literal["exo_rw", "exo_pref", "dpo_rw", "dpo_pref"] = "exo_rw"
    beta_pi: PositiveFloat = 0.5
    beta_r: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        1e-3, description="epsilon of exo_pref; 4.5397868702434395e-05 reproduces the authors' released code"
    )
    temperature: PositiveFloat = Field(0.8, description="tau; logits of policy and reference are divided by it")
