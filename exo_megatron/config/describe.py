"""Descriptions of the values that a configuration class accepts, for messages and `--help`."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from exo_megatron.config.document import Key, dotted, show
from exo_megatron.config.sections import Section

_NAMES: dict[Any, str] = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}


@dataclass(frozen=True)
class KeyDescription:
    """One line of a listing: dotted key, accepted values, default and meaning.

    The default is None where the key is required.
    """

    key: str
    accepts: str
    default: str | None
    meaning: str


def describe_keys(
    section: type[Section], prefix: str = "", instance: Section | None = None
) -> Iterator[KeyDescription]:
    """List all keys of a configuration class and of its sections, in the order of their definition.

    Defaults are those of `instance`, or those of the class where there is no instance.
    """
    for name, info in section.model_fields.items():
        required = instance is None and info.is_required()
        default = info.default if instance is None else dict(instance)[name]
        inner = section_class(info.annotation)
        is_list = get_origin(info.annotation) is list
        if inner is None or is_list or not (required or isinstance(default, Section)):
            accepts = describe_type(info.annotation, info.metadata)
            shown = default if isinstance(default, str) else show(default)
            yield KeyDescription(prefix + name, accepts, None if required else shown, info.description or "")
        if inner is not None:
            below = f"{prefix}{name}.N." if is_list else f"{prefix}{name}."
            yield from describe_keys(inner, below, default if isinstance(default, Section) else None)


def describe_key(section: type[Section], key: Key) -> str:
    """Describe the values that `key` accepts.

    A key that is not a field of a section is taken as an entry of a free-form mapping.
    """
    info = None
    current: type[Section] | None = section
    for part in key:
        if current is not None and isinstance(part, int):
            continue
        if current is None or part not in current.model_fields:
            return _describe_item(info, key)
        info = current.model_fields[str(part)]
        current = section_class(info.annotation)
    return "a mapping" if info is None else describe_type(info.annotation, info.metadata)


def section_at(section: type[Section], key: Key) -> type[Section] | None:
    """Return the class of the section at `key`, or None where the value there is not a section."""
    current: type[Section] | None = section
    for part in key:
        if current is not None and isinstance(part, int):
            continue
        if current is None or part not in current.model_fields:
            return None
        current = section_class(current.model_fields[str(part)].annotation)
    return current


def section_class(annotation: Any) -> type[Section] | None:
    """Return the section in `Section`, `Section | None` or `list[Section]`, else None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_class(argument) for argument in get_args(annotation) if get_origin(annotation) is not Annotated)
    return next((each for each in found if each is not None), None)


def describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Describe a field's type and constraints in words.

    Examples are `integer > 0`, `one of fp32, bf16` and `path or null`.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *constraints = get_args(annotation)
        return describe_type(base, [*_flatten(constraints), *metadata])
    if origin in (Union, types.UnionType):
        parts = [describe_type(each, metadata) for each in get_args(annotation) if each is not type(None)]
        return " or ".join([*parts, "null"])
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if origin is list:
        return "non-empty list of sections"
    if origin is tuple:
        return f"list, each {describe_type(get_args(annotation)[0])}"
    if origin is dict:
        values = get_args(annotation)[1]
        return "mapping" if values is Any else f"mapping of names to {describe_type(values)}s"
    section = section_class(annotation)
    if section is not None:
        return f"section ({', '.join(section.model_fields)})"
    metadata = list(metadata)
    name = ("non-empty " if annotated_types.MinLen(1) in metadata else "") + _NAMES[annotation]
    return " ".join([name, *_describe_limits(metadata)])


NAMES_ELSEWHERE = {
    "activation_checkpointing": "compute.recompute",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "adam_epsilon": "optimizer.eps",
    "beta": "loss.beta_pi",
    "bf16": "compute.precision",
    "checkpoint_dir": "output",
    "data.path": "candidates",
    "data_path": "data.path",
    "dataset_name": "data.path",
    "dataset_train_split": "data.split",
    "default_local_dir": "output",
    "enable_gradient_checkpointing": "compute.recompute",
    "expert_model_parallel_size": "parallel.expert",
    "expert_parallel_size": "parallel.expert",
    "fp16": "compute.precision",
    "global_batch_size": "batch.groups",
    "grad_clip": "optimizer.clip_grad",
    "gradient_accumulation_steps": "batch.groups",
    "gradient_checkpointing": "compute.recompute",
    "keep_top_k": "save.keep",
    "learning_rate": "optimizer.lr",
    "log_interval": "log.interval",
    "logging_steps": "log.interval",
    "loss_type": "loss.kind",
    "lr_decay_style": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_warmup_fraction": "optimizer.warmup_steps",
    "lr_warmup_iters": "optimizer.warmup_steps",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "max_completion_length": "data.max_completion_tokens",
    "max_grad_norm": "optimizer.clip_grad",
    "max_length": "data.max_prompt_tokens data.max_completion_tokens",
    "max_num_epochs": "batch.epochs",
    "max_num_steps": "batch.max_steps",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "data.max_completion_tokens",
    "max_seq_length": "data.max_prompt_tokens data.max_completion_tokens",
    "max_tokens": "sampling.max_new_tokens",
    "max_total_sequence_length": "data.max_prompt_tokens data.max_completion_tokens",
    "max_train_samples": "data.limit",
    "micro_batch_size": "batch.groups compute.max_tokens_per_microbatch",
    "min_lr": "optimizer.min_lr_ratio",
    "model_name": "model.checkpoint",
    "model_name_or_path": "model.checkpoint",
    "model_path": "model.checkpoint",
    "num_generations": "sampling.candidates",
    "num_generations_per_prompt": "sampling.candidates",
    "num_return_sequences": "sampling.candidates",
    "num_train_epochs": "batch.epochs",
    "num_warmup_steps": "optimizer.warmup_steps",
    "output_dir": "output",
    "per_device_train_batch_size": "batch.groups compute.max_tokens_per_microbatch",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pipeline_parallel_size": "parallel.pipeline",
    "ppo_max_token_len_per_gpu": "compute.max_tokens_per_microbatch",
    "ppo_mini_batch_size": "batch.groups",
    "precompute_ref_log_probs": "reference_logprobs",
    "recompute_granularity": "compute.recompute",
    "ref_model": "reference.checkpoint",
    "ref_model_name_or_path": "reference.checkpoint",
    "reference_policy_kl_penalty": "loss.beta_pi",
    "report_to": "log.tensorboard",
    "response_length": "sampling.max_new_tokens",
    "reward_funcs": "reward.function",
    "reward_model_path": "reward.path",
    "rpo_alpha": "loss.nll_weight",
    "save_freq": "save.interval",
    "save_interval": "save.interval",
    "save_period": "save.interval",
    "save_steps": "save.interval",
    "save_total_limit": "save.keep",
    "seq_length": "data.max_prompt_tokens data.max_completion_tokens",
    "sequence_parallel": "parallel.sequence",
    "sft_loss_weight": "loss.nll_weight",
    "tensor_model_parallel_size": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "tokenizer_model": "data.tokenizer",
    "tokenizer_name": "data.tokenizer",
    "torch_dtype": "compute.precision",
    "total_epochs": "batch.epochs",
    "total_training_steps": "batch.max_steps",
    "train_batch_size": "batch.groups",
    "train_data_path": "data.path",
    "train_files": "data.path",
    "train_global_batch_size": "batch.groups",
    "train_iters": "batch.max_steps",
    "train_mb_tokens": "compute.max_tokens_per_microbatch",
    "train_micro_batch_size": "batch.groups compute.max_tokens_per_microbatch",
    "warmup_ratio": "optimizer.warmup_steps",
}
"""Our keys by the names that TRL, transformers, NeMo-RL, verl and Megatron-LM have for them.

Several keys stand with a space between them: they divide among them what the name means.
"""

VALUES_ELSEWHERE = {
    "loss.kind": {
        "dpo": "dpo_pref",
        "exo": "exo_rw",
        "exo_pair": "exo_pref",
        "ipo": "ipo_pref",
        "sigmoid": "dpo_pref",
    },
    "optimizer.schedule": {
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine",
    },
    "compute.precision": {
        "bfloat16": "bf16",
        "float32": "fp32",
        "torch.bfloat16": "bf16",
        "torch.float32": "fp32",
    },
}
"""Our values of a key by the names that TRL, transformers and NeMo-RL have for them."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` was probably meant to be, or None."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def _describe_item(info: FieldInfo | None, key: Key) -> str:
    if info is not None and get_origin(info.annotation) is dict:
        return describe_type(get_args(info.annotation)[1])
    return f"a value that fits {dotted(key)}"


def _flatten(constraints: Iterable[Any]) -> Iterator[Any]:
    for constraint in constraints:
        yield from constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]


def _describe_limits(metadata: Iterable[Any]) -> list[str]:
    limits = []
    for constraint in metadata:
        match constraint:
            case annotated_types.Gt(gt=bound):
                limits.append(f"> {bound}")
            case annotated_types.Ge(ge=bound):
                limits.append(f">= {bound}")
            case annotated_types.Lt(lt=bound):
                limits.append(f"< {bound}")
            case annotated_types.Le(le=bound):
                limits.append(f"<= {bound}")
    return [" and ".join(limits)] if limits else []
