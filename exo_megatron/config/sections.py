"""Sections shared by the configurations of several stages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from exo_megatron.config.losses import FUNCTION, LOSSES, kinds_comparing

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
DecayRate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""Decay of a running mean; at 1 the mean would never change."""


def _expand_home(path: Path) -> Path:
    """Replace `~` by the home directory, as the shell does."""
    return Path(os.path.expanduser(path))


FilePath = Annotated[Path, AfterValidator(_expand_home)]

ColumnNames = Annotated[
    dict[str, str],
    Field(description="our name -> the data's, of the columns to read; default: those of a known layout"),
]
Transcript = Annotated[
    Literal["text", "messages"],
    Field(description="whether strings stay text or become messages: turns of Human: and Assistant:, else one"),
]
OnInvalid = Annotated[
    Literal["error", "skip"],
    Field(description="records that cannot be used: an error, or left out and counted in data_report.json"),
]


_FOR_DIGEST = "digest"


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    added_later: ClassVar[frozenset[str]] = frozenset()
    """Keys that digests leave out at their defaults, because an earlier version did not have them."""

    places: ClassVar[frozenset[str]] = frozenset()
    """Keys that digests leave out: they say where something lies, or how a run is watched, and not what it is."""

    takes_defaults: ClassVar[bool] = True
    """Whether the section of its name under `defaults` of a `run` file holds for it."""

    def digest_json(self) -> str:
        """Return the settings as JSON for digests that tell whether two runs are the same work.

        Keys that a later version has added are left out at their defaults, so that what an earlier
        version has begun can be resumed.
        """
        return self.model_dump_json(context=_FOR_DIGEST)

    @model_serializer(mode="wrap")
    def _without_later_defaults_in_digests(
        self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> Any:
        """See digest_json."""
        values = serialize(self)
        if info.context == _FOR_DIGEST:
            defaults = {key: _for_digest(type(self).model_fields[key].default) for key in self.added_later}
            values = {key: value for key, value in values.items() if key not in self.places}
            return {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}
        return values


def _for_digest(default: object) -> object:
    """Return a default as it stands among the values of a digest."""
    return default.model_dump(mode="json", context=_FOR_DIGEST) if isinstance(default, Section) else default


class ParallelConfig(Section):
    """The sizes of the parallel groups that hold one model copy; the rest is data parallel."""

    tensor: PositiveInt = Field(default=1, description="tensor-parallel size")
    pipeline: PositiveInt = Field(default=1, description="pipeline-parallel size")
    expert: PositiveInt = Field(
        default=1, description="expert-parallel size; the tensor-parallel ranks are used first, then model copies"
    )
    sequence: bool = Field(default=True, description="sequence parallelism, in effect where tensor > 1")

    @property
    def expert_tensor(self) -> int:
        """Number of parts into which each expert is cut."""
        return max(self.tensor // self.expert, 1)

    @property
    def processes(self) -> int:
        """The fewest processes that hold one model copy; a world size is a multiple of it."""
        return max(self.tensor, self.expert) * self.pipeline

    @property
    def token_multiple(self) -> int:
        """Number of tokens of which the length of a micro-batch must be a multiple."""
        return self.tensor if self.sequence else 1


class RuntimeConfig(Section):
    """The times that processes wait for each other. Nothing here changes a result."""

    start_seconds: Annotated[float, Field(ge=1, le=86400)] = Field(
        default=90, description="time within which all processes must come after rank 0 has"
    )
    timeout_seconds: Annotated[float, Field(ge=2, le=86400)] = Field(
        default=90, description="a process without any sign of life for so long (killed, frozen, node gone) is lost"
    )
    stall_seconds: Annotated[float, Field(ge=2, le=604800)] = Field(
        default=1800, description="the run ends if no process has gone on for so long, though all are alive"
    )


class ComputeConfig(Section):
    """Arithmetic and memory."""

    precision: Literal["fp32", "bf16"] = Field(default="bf16", description="type of parameters and activations")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="activations recomputed in the backward pass: none, core attention, whole layers"
    )
    max_tokens_per_microbatch: PositiveInt = Field(
        default=8192, description="tokens in one micro-batch; larger groups are trained on in parts"
    )
    logits_memory_mib: NonNegativeFloat = Field(
        default=1024, description="memory for logits on one rank; what does not fit is computed again in the backward"
    )


class ModelConfig(Section):
    """The source of a model."""

    checkpoint: FilePath = Field(
        description="distributed checkpoint, or a stage's output directory (newest complete step)"
    )


class DataConfig(Section):
    """Records: prompt+chosen, prompt+chosen+rejected, or prompt+completions(+rewards). See docs."""

    added_later = frozenset(
        {
            "revision",
            "subset",
            "columns",
            "transcript",
            "train_on",
            "chat_template",
            "template_kwargs",
            "on_invalid",
            "on_overlong",
        }
    )
    places = frozenset({"cache"})

    path: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        min_length=1,
        description="JSONL, JSON, CSV, parquet or Arrow file, directory of such or of an earlier stage, local or hub "
        "`datasets` name",
    )
    split: str = Field(default="train", min_length=1, description="split, or a slice such as train[:1000]")
    revision: str | None = Field(default=None, description="branch, tag or commit of a data set of the hub")
    subset: str | None = Field(default=None, description="subset (configuration) of a data set of the hub")
    columns: ColumnNames = {}
    transcript: Transcript = "text"
    train_on: Literal["last", "all"] = Field(
        default="last", description="answers of a whole conversation that sft trains on, each with what is before it"
    )
    tokenizer: FilePath | None = Field(
        default=None, description="tokenizer directory or .model file; default: the checkpoint's own"
    )
    chat_template: str | None = Field(
        default=None, min_length=1, description="Jinja template of chat messages, or its file; default: the tokenizer's"
    )
    template_kwargs: dict[str, Any] = Field(
        default={}, description="variables of the chat template, such as enable_thinking"
    )
    max_prompt_tokens: PositiveInt = Field(default=512, description="of a prompt; see on_overlong")
    max_completion_tokens: PositiveInt = Field(default=512, description="of a completion; see on_overlong")
    on_invalid: OnInvalid = "error"
    on_overlong: Literal["error", "skip", "truncate_prompt_left"] = Field(
        default="error",
        description="records over the limits: an error; left out; prompts cut on the left, with long answers as "
        "on_invalid says",
    )
    cache: FilePath | None = Field(
        default=None, description="directory of tokenised data; default: ~/.cache/exo-megatron/data (XDG_CACHE_HOME)"
    )
    limit: PositiveInt | None = Field(default=None, description="use only the first N records")


class CandidatesDataConfig(Section):
    """The reading of candidates that are no output of a stage. They are scored as text and have no token ids."""

    takes_defaults = False  # that section is about the data of the models, and names their columns

    columns: ColumnNames = {}
    transcript: Transcript = "text"
    on_invalid: OnInvalid = "error"


class OptimizerConfig(Section):
    """Adam with megatron-core's distributed optimizer, and the learning-rate schedule."""

    lr: PositiveFloat = Field(default=1e-6, description="largest learning rate")
    beta1: DecayRate = Field(default=0.9, description="decay of the first moment")
    beta2: DecayRate = Field(default=0.95, description="decay of the second moment")
    eps: PositiveFloat = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="decoupled weight decay")
    clip_grad: NonNegativeFloat = Field(default=1.0, description="largest global gradient norm; 0 turns clipping off")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="decay of the learning rate after the warm-up"
    )
    warmup_steps: NonNegativeInt = Field(default=0, description="steps of linear rise from 0 to lr")
    min_lr_ratio: Fraction = Field(
        default=0.0, description="share of lr that the schedule falls towards and would reach one step after the last"
    )


class BatchConfig(Section):
    """The number of groups of one optimizer step, and the length of the training."""

    groups: PositiveInt = Field(
        default=64, description="groups (prompts) per optimizer step, over all data-parallel ranks"
    )
    epochs: PositiveInt = Field(default=1, description="passes over the data")
    max_steps: PositiveInt | None = Field(
        default=None, description="stop after this many steps if the epochs last longer"
    )


class SaveConfig(Section):
    """Checkpoints of a run."""

    interval: PositiveInt | None = Field(default=None, description="save every N steps; default: only at the end")
    keep: Annotated[int, Field(ge=2)] = Field(
        default=2, description="complete checkpoints kept; older ones are removed"
    )
    all_steps: bool = Field(default=False, description="keep every checkpoint, for reward/KL curves")


class LogConfig(Section):
    """Metrics: JSONL and TensorBoard under the output directory, and a progress line on rank 0."""

    interval: PositiveInt = Field(default=1, description="record metrics every N steps")
    tensorboard: bool = Field(default=True, description="write TensorBoard events besides metrics.jsonl")


class SamplingConfig(Section):
    """The sampling of candidates."""

    added_later = frozenset({"stop_token_ids", "stop"})

    candidates: PositiveInt = Field(default=4, description="K, candidates per prompt")
    temperature: PositiveFloat = Field(default=0.8, description="tau; logits are divided by it")
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=1.0, description="draw from the most likely tokens of this total probability"
    )
    max_new_tokens: PositiveInt = Field(default=128, description="a candidate that is not ended by then is cut")
    stop_token_ids: tuple[NonNegativeInt, ...] = Field(
        default=(), description="ids that end a candidate, besides those that the model's files name"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="strings that end a candidate once it has one of them"
    )
    max_active_candidates: PositiveInt = Field(
        default=256, description="candidates decoded at once by one data-parallel rank"
    )


class RewardConfig(Section):
    """The source of rewards."""

    kind: Literal["function", "hf_classifier"] = Field(default="function", description="what computes the rewards")
    function: str | None = Field(
        default=None,
        description="package.module:name, called with (prompts, completions) and the columns that it names",
    )
    path: FilePath | None = Field(default=None, description="local HF sequence classifier (safetensors)")
    label: NonNegativeInt | None = Field(
        default=None, description="class whose log-odds are the reward; default: one output"
    )
    batch_size: PositiveInt = Field(default=32, description="candidates scored at once")


if TYPE_CHECKING:
    LossKind = str
else:
    LossKind = Literal[(*LOSSES, FUNCTION)]


class LossConfig(Section):
    """The alignment objective, in the paper's symbols."""

    added_later = frozenset({"function", "nll_weight"})

    kind: LossKind = Field(
        default="exo_rw",
        description=", ".join(f"{kind}: {row.equation}" for kind, row in LOSSES.items())
        + f"; {FUNCTION}: a loss of your own",
    )
    function: str | None = Field(
        default=None, description="package.module:name of a loss; kind is function if it is not given"
    )
    beta_pi: PositiveFloat = Field(default=0.5, description="scale of the log-ratio of policy and reference")
    beta_r: PositiveFloat = Field(
        default=0.1, description=f"the rewards are divided by it; {kinds_comparing('rewards')}"
    )
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5, allow_inf_nan=False)] = Field(
        default=1e-3, description="epsilon of exo_pref; 4.5397868702434395e-05 reproduces the authors' released code"
    )
    temperature: PositiveFloat = Field(default=0.8, description="tau; logits of policy and reference are divided by it")
    nll_weight: NonNegativeFloat = Field(
        default=0.0,
        description="weight of the negative log-likelihood per token of each group's best candidate, at temperature 1",
    )

    @model_validator(mode="before")
    @classmethod
    def _function_implies_its_kind(cls, data: Any) -> Any:
        """Set the kind to `function` where only the function is given."""
        if isinstance(data, dict) and data.get("function") is not None and "kind" not in data:
            return {**data, "kind": FUNCTION}
        return data
