"""What the ranks of the expert tests do. Weights go in and out by the keys and offsets of `sharded_state_dict`.

So no converter takes part, and the checkpoint's keys and axes are checked on the way: `whole_tensors` writes down, from
the contract of the checkpoint alone, what every stored tensor of a Hugging Face model must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from exo_megatron.checkpoint.load import load_sharded
from exo_megatron.checkpoint.save import save_checkpoint
from exo_megatron.config.sections import ComputeConfig, LossConfig, OptimizerConfig, ParallelConfig, SamplingConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.prompts import Prompt
from exo_megatron.execution.forward import candidate_logprobs
from exo_megatron.execution.policy import Policy
from exo_megatron.models.policy import build_policy
from exo_megatron.models.spec import Experts, ModelSpec, Rotary
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.rollout.engine import GeneratedGroup
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import Trainee, make_trainee
from exo_megatron.training.step import StepResult, forward_gradients, plan_step, train_step
from tests.reference.sharded import Place, parts_of
from tests.reference.tiny_llama import EosTokenizer


def spec_of(config: PreTrainedConfig) -> ModelSpec:
    qwen = config.model_type == "qwen3_moe"
    experts = Experts(
        count=config.num_experts if qwen else config.num_local_experts,
        per_token=config.num_experts_per_tok,
        ffn_hidden_size=config.moe_intermediate_size if qwen else config.intermediate_size,
        normalized=config.norm_topk_prob if qwen else True,
    )
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return ModelSpec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=experts.ffn_hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        qk_norm=qwen,
        rotary=Rotary(base=config.rope_parameters["rope_theta"], dim=head_dim),
        experts=experts,
    )


def whole_tensors(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """HF tensors of transformers 5 (experts fused in memory) by the keys of the checkpoint, layers stacked in front."""

    def padded(rows: Tensor) -> Tensor:
        return torch.cat((rows, rows.new_zeros(spec.padded_vocab_size - spec.vocab_size, spec.hidden_size)))

    def stacked(name: str) -> Tensor:
        return torch.stack([state[f"model.layers.{layer}.{name}"] for layer in range(spec.layers)])

    parts = [
        stacked(f"self_attn.{letter}_proj.weight").unflatten(1, (spec.kv_heads, -1, spec.head_dim)) for letter in "qkv"
    ]
    whole = {
        "embedding.word_embeddings.weight": padded(state["model.embed_tokens.weight"]),
        "decoder.layers.input_layernorm.weight": stacked("input_layernorm.weight"),
        "decoder.layers.pre_mlp_layernorm.weight": stacked("post_attention_layernorm.weight"),
        "decoder.layers.self_attention.linear_qkv.weight": torch.cat(parts, dim=2).flatten(1, 3),
        "decoder.layers.self_attention.linear_proj.weight": stacked("self_attn.o_proj.weight"),
        "decoder.layers.mlp.router.weight": stacked("mlp.gate.weight"),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": stacked("mlp.experts.gate_up_proj"),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": stacked("mlp.experts.down_proj"),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": padded(state["lm_head.weight"]),
    }
    if spec.qk_norm:
        for letter in "qk":
            key = f"decoder.layers.self_attention.{letter}_layernorm.weight"
            whole[key] = stacked(f"self_attn.{letter}_norm.weight")
    return whole


def policy_from_hf(
    path: Path, topology: Topology, compute: ComputeConfig, tokenizer: EosTokenizer | None = None
) -> Policy:
    """`path`: torch.save of (config, HF state dict). Every stored tensor must be asked for by some rank."""
    config, state = torch.load(path, weights_only=False)
    spec = spec_of(config)
    model = build_policy(spec, topology, compute)
    whole = whole_tensors(state, spec)
    asked = set()
    with torch.no_grad():
        for (key, place), part in parts_of(model, lambda parameter: parameter):
            part.copy_(whole[key][place].view(part.shape))
            asked.add(key)
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, asked)
    assert set().union(*everywhere) == whole.keys()
    return Policy(model, topology, compute, tokenizer=tokenizer)


def generate(
    runtime: Runtime,
    *,
    weights: Path,
    parallel: dict[str, Any],
    shares: list[list[tuple[str, tuple[int, ...]]]],
    sampling: dict[str, Any],
    eos_id: int,
) -> list[GeneratedGroup]:
    """The prompts of this rank's model copy, `shares[data rank]`: as many and as long as the test likes."""
    with model_parallel(runtime, ParallelConfig(**parallel), seed=0) as topology:
        policy = policy_from_hf(weights, topology, ComputeConfig(precision="fp32"), EosTokenizer(eos_id))
        prompts = [Prompt(id=name, text="", ids=ids) for name, ids in shares[topology.data_rank]]
        return NativeEngine(policy).generate(prompts, SamplingConfig(**sampling), seed=3, progress=None)


@dataclass(frozen=True)
class Trained:
    """What one rank saw. logprobs: of every candidate of all steps, before them. gradients (of the first step, before
    clipping) and weights (after the last) by place.
    """

    logprobs: list[tuple[float, ...]]
    results: list[StepResult]
    gradients: list[tuple[Place, Tensor]]
    weights: list[tuple[Place, Tensor]]


def train(
    runtime: Runtime,
    *,
    weights: Path,
    parallel: dict[str, Any],
    compute: dict[str, Any],
    optimizer: dict[str, Any],
    loss: dict[str, Any],
    steps: list[list[Group]],
    save: tuple[int, Path] | None,
    resume: tuple[int, Path] | None,
    hf: Path,
) -> Trained:
    """Steps of `align` on groups with reference log-probs. save: after how many steps, and where; resume likewise."""
    settings = ComputeConfig(**compute)
    objective = AlignObjective.of(LossConfig(**loss))
    with model_parallel(runtime, ParallelConfig(**parallel), seed=0) as topology:
        policy = policy_from_hf(weights, topology, settings)
        trainee = make_trainee(policy, OptimizerConfig(**optimizer))
        groups = [group for step in steps for group in step]
        scores = candidate_logprobs(policy, groups, temperature=objective.config.temperature)
        first = 0
        if resume is not None:
            first, path = resume
            trainee.load_state(load_sharded(path, trainee.sharded_state(loading=True), None))
        gradients: list[tuple[Place, Tensor]] = []
        results = []
        for step in range(first, len(steps)):
            batches = plan_step(trainee, steps[step], objective)
            if step == first:
                forward_gradients(trainee, batches.microbatches, objective, batches.oversized)
                pick = complete_gradients(trainee).__getitem__
                gradients = [(place, part.clone()) for place, part in parts_of(policy.model, pick)]
            work = {"oversized": batches.oversized, "learning_rate": optimizer["lr"]}
            results.append(train_step(trainee, batches.microbatches, objective, **work))
            if save is not None and step + 1 == save[0]:
                state = trainee.sharded_state(loading=False)
                save_checkpoint(
                    save[1],
                    state,
                    spec=policy.spec,
                    hf_files=hf,
                    step=None,
                    kind="training",
                    trainer_state={},
                    runtime=runtime,
                )
        final = [(place, part.detach().clone()) for place, part in parts_of(policy.model, lambda p: p)]
        return Trained(scores, results, gradients, final)


def complete_gradients(trainee: Trainee) -> dict[Tensor, Tensor]:
    """Each rank of a buffer's data-parallel group holds its reduced shard of every bucket: put copies together."""
    gradients: dict[Tensor, Tensor] = {}
    for buffer in [*trainee.model.buffers, *trainee.model.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        whole = torch.empty_like(buffer.grad_data)
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            shards = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(shards, own, group=group)
            whole[bucket.offset : bucket.offset + bucket.grad_data.numel()] = torch.cat(shards)
        for parameter, (start, end, _) in buffer.param_index_map.items():
            gradients[parameter] = whole[start:end].view(parameter.shape)
    return gradients
