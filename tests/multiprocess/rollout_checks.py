"""What the ranks of the rollout tests do: HF weights copied by hand into the policy, then generate or score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from exo_megatron.config.sections import ComputeConfig, ParallelConfig, SamplingConfig
from exo_megatron.config.stages import ImportConfig, RolloutConfig
from exo_megatron.data import shards
from exo_megatron.data.candidates import CandidateRecord
from exo_megatron.data.groups import Group
from exo_megatron.data.prompts import Prompt
from exo_megatron.errors import ExoError
from exo_megatron.execution.forward import candidate_logprobs
from exo_megatron.execution.policy import Policy
from exo_megatron.models.policy import build_policy
from exo_megatron.models.spec import ModelSpec, Rotary
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.rollout import units
from exo_megatron.rollout.engine import GeneratedGroup
from exo_megatron.rollout.generate import generate_records
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.stages import rollout
from exo_megatron.stages.import_hf import run_import
from exo_megatron.stages.rollout import run_rollout
from tests.reference.tiny_llama import EosTokenizer


def spec_of(config: LlamaConfig) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rotary=Rotary(base=config.rope_parameters["rope_theta"], dim=config.hidden_size // config.num_attention_heads),
        tied_embeddings=config.tie_word_embeddings,
    )


def policy_from_hf(
    path: Path, topology: Topology, compute: ComputeConfig, tokenizer: EosTokenizer | None = None
) -> Policy:
    """`path`: torch.save of (LlamaConfig, HF state dict)."""
    config, state = torch.load(path, weights_only=False)
    spec = spec_of(config)
    model = build_policy(spec, topology, compute)
    first = model.decoder.layers[0].layer_number - 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_local(name, state, spec, first, topology))
    return Policy(model, topology, compute, tokenizer=tokenizer)


def _local(name: str, state: dict[str, Tensor], spec: ModelSpec, first_layer: int, topology: Topology) -> Tensor:
    rank, ranks = topology.tensor_rank, topology.tensor_size
    if not name.startswith("decoder.layers."):
        if name == "decoder.final_layernorm.weight":
            return state["model.norm.weight"]
        embedding = name.startswith("embedding.") or spec.tied_embeddings
        rows = state["model.embed_tokens.weight" if embedding else "lm_head.weight"]
        # The padding is filled with what would be drawn often if it were not masked.
        padding = rows.new_full((spec.padded_vocab_size - spec.vocab_size, spec.hidden_size), 0.3)
        return torch.cat((rows, padding)).chunk(ranks)[rank]
    _, _, index, rest = name.split(".", 3)
    hf = f"model.layers.{first_layer + int(index)}."
    if rest == "self_attention.linear_qkv.weight":
        q, k, v = (
            state[f"{hf}self_attn.{letter}_proj.weight"].view(spec.kv_heads, -1, spec.hidden_size) for letter in "qkv"
        )
        return torch.cat((q, k, v), dim=1).chunk(ranks)[rank].flatten(0, 1)
    if rest == "mlp.linear_fc1.weight":
        parts = (state[f"{hf}mlp.{half}_proj.weight"].chunk(ranks)[rank] for half in ("gate", "up"))
        return torch.cat(tuple(parts))
    if rest == "self_attention.linear_proj.weight":
        return state[f"{hf}self_attn.o_proj.weight"].chunk(ranks, dim=1)[rank]
    if rest == "mlp.linear_fc2.weight":
        return state[f"{hf}mlp.down_proj.weight"].chunk(ranks, dim=1)[rank]
    norm = {"input_layernorm.weight": "input_layernorm", "pre_mlp_layernorm.weight": "post_attention_layernorm"}[rest]
    return state[f"{hf}{norm}.weight"]


def generate(
    runtime: Runtime,
    *,
    weights: Path,
    parallel: dict[str, Any],
    prompts: list[tuple[str, tuple[int, ...]]],
    samplings: list[dict[str, Any]],
    eos_id: int,
    seed: int,
    precision: str = "fp32",
) -> list[tuple[list[GeneratedGroup], list[CandidateRecord] | None]]:
    """For each sampling: this rank's engine output on all prompts, and the records of the whole world."""
    compute = ComputeConfig(precision=precision)
    asked = [Prompt(id=name, text=f"text of {name}", ids=ids) for name, ids in prompts]
    results = []
    with model_parallel(runtime, ParallelConfig(**parallel), seed=0) as topology:
        policy = policy_from_hf(weights, topology, compute, EosTokenizer(eos_id))
        engine = NativeEngine(policy)
        for settings in samplings:
            sampling = SamplingConfig(**settings)
            groups = engine.generate(asked, sampling, seed=seed, progress=None)
            records = generate_records(engine, asked, sampling, policy, seed=seed, runtime=runtime)
            results.append((groups, records))
        assert policy.model.training
    return results


def score(
    runtime: Runtime,
    *,
    weights: Path,
    parallel: dict[str, Any],
    groups: list[Group],
    max_tokens: int,
    temperature: float,
    precision: str = "fp32",
) -> list[tuple[float, ...]]:
    compute = ComputeConfig(precision=precision, max_tokens_per_microbatch=max_tokens, logits_memory_mib=0)
    with model_parallel(runtime, ParallelConfig(**parallel), seed=0) as topology:
        policy = policy_from_hf(weights, topology, compute)
        return candidate_logprobs(policy, groups, temperature=temperature)


@contextmanager
def small_units(*, prompts: int) -> Iterator[None]:
    """Make shards of so many prompts, and units of one shard."""
    former = shards.RECORDS_PER_SHARD, units.FILLS
    shards.RECORDS_PER_SHARD, units.FILLS = prompts, 0
    try:
        yield
    finally:
        shards.RECORDS_PER_SHARD, units.FILLS = former


class _Cut(Exception):
    pass


@contextmanager
def cut_after(*, count: int) -> Iterator[None]:
    """End the stage when it draws more than so many units."""
    left, original = iter(range(count)), rollout.draw_candidates

    def draw(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise _Cut
        return original(*arguments, **named)

    rollout.draw_candidates = draw
    try:
        yield
    finally:
        rollout.draw_candidates = original


def run_stage(
    runtime: Runtime, *, hf: Path, output: Path, config: dict[str, Any], failing: list[dict[str, Any]]
) -> list[str]:
    """Import `hf`, run the stage, then once more for each of the settings that must fail: their messages.

    Besides, run it in units of one shard with two prompts: at once, and cut after two units.
    """
    run_import(ImportConfig(output=output / "model", hf=hf), runtime)
    common = {**config, "model": {"checkpoint": output / "model"}}
    run_rollout(RolloutConfig.model_validate({**common, "output": output / "rollout"}), runtime)
    with small_units(prompts=2):
        run_rollout(RolloutConfig.model_validate({**common, "output": output / "units"}), runtime)
        cut = RolloutConfig.model_validate({**common, "output": output / "cut"})
        with cut_after(count=2), suppress(_Cut):
            run_rollout(cut, runtime)
        runtime.barrier()
        if runtime.is_main:
            damaged = next((output / "cut" / "candidates").glob("shard-00000-*.jsonl"))
            damaged.write_bytes(damaged.read_bytes()[:-20])
        with cut_after(count=3):  # the damaged one and the two that are left
            run_rollout(cut, runtime)
    messages = []
    for settings in failing:
        try:
            run_rollout(RolloutConfig.model_validate({**common, "output": output / "failed", **settings}), runtime)
        except ExoError as error:
            messages.append(str(error))
    return messages
