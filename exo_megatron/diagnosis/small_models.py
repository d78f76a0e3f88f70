"""Small random models for the checks: an HF checkpoint made on the CPU, and its import."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exo_megatron.checkpoint.dist_format import PlannedShard, planned_state
from exo_megatron.checkpoint.save import save_checkpoint
from exo_megatron.config.sections import LossConfig
from exo_megatron.conversion.importing import ImportPlan, hf_spec
from exo_megatron.conversion.rules import TensorRule
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.plain import NamedTensors, PlainModel, plain_logprobs
from exo_megatron.diagnosis.work import Lengths
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.ending import on_main
from exo_megatron.parallel.runtime import Runtime

EXO = LossConfig(kind="exo_rw", beta_pi=0.2, beta_r=0.7, temperature=0.8)
REFERENCE_NOISE = 2.0
"""Nats, standard deviation: how far the reference's log-probs are from those of the policy."""


@dataclass(frozen=True)
class SmallSizes:
    """Sizes of the small models and of their data.

    Attributes:
        hidden, ffn, layers, head_dim, vocab: of the model. It has as many key/value heads as there
            are ranks, at least 2, and twice as many query heads.
        experts: of a mixture; two are chosen for a token.
        groups: their lengths.
        max_tokens: of a micro-batch. The longest group exceeds it and is trained on in parts.
    """

    hidden: int
    ffn: int
    layers: int
    head_dim: int
    vocab: int
    experts: int
    groups: Sequence[Lengths]
    max_tokens: int


@dataclass(frozen=True)
class SmallModel:
    """A model on disk, twice, and in memory.

    Attributes:
        spec: the model.
        tensors: by HF name, in fp32; every value is one of bf16, so that both precisions have the
            same weights.
        hf: directory of the HF checkpoint.
        checkpoint: the distributed checkpoint that was imported from it.
        rules: how the tensors of one become those of the other.
        groups: candidate groups with rewards and reference log-probs.
        max_tokens: of a micro-batch.
    """

    spec: ModelSpec
    tensors: NamedTensors
    hf: Path
    checkpoint: Path
    rules: tuple[TensorRule, ...]
    groups: tuple[Group, ...]
    max_tokens: int

    def plain(self, dtype: torch.dtype) -> PlainModel:
        """Make the plain model with these weights."""
        return PlainModel(self.spec, {name: tensor.to(dtype) for name, tensor in self.tensors.items()})


def make_small_model(directory: Path, sizes: SmallSizes, runtime: Runtime, *, experts: bool) -> SmallModel:
    """Draw a Llama, or a Mixtral with `experts`, write it and import it.

    Collective over the world; all ranks see the directory.
    """
    name = "experts" if experts else "dense"
    hf, checkpoint = directory / f"{name}-hf", directory / name
    config = _config(sizes, ranks=runtime.world_size, experts=experts)
    on_main(runtime, lambda: _write_hf(hf, config))
    family, spec = hf_spec(hf)
    rules = family.tensors(spec)
    tensors = draw_tensors(rules)
    on_main(runtime, lambda: save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"}))
    _import(hf, checkpoint, runtime)
    model = SmallModel(spec, tensors, hf, checkpoint, rules, (), sizes.max_tokens)
    drawn = draw_groups(sizes.groups, spec.vocab_size)
    groups = on_main(runtime, lambda: _with_reference(model.plain(torch.float64), drawn))
    return replace(model, groups=groups)


def _config(sizes: SmallSizes, *, ranks: int, experts: bool) -> dict[str, Any]:
    kv_heads = max(2, ranks)
    config: dict[str, Any] = {
        "model_type": "mixtral" if experts else "llama",
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    if experts:
        config |= {"num_local_experts": sizes.experts, "num_experts_per_tok": 2, "sliding_window": None}
    return config


def _write_hf(hf: Path, config: dict[str, Any]) -> None:
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config), encoding="utf-8")


def draw_tensors(rules: Sequence[TensorRule]) -> NamedTensors:
    """Draw every HF tensor: norms around 1, matrices that keep the size of what they multiply.

    Values are rounded to bf16. The same on every rank.
    """
    generator = torch.Generator().manual_seed(0)
    sources = {name: shape for rule in rules for entry in rule.entries() for name, shape in entry.sources.items()}
    return {name: _draw(name, shape, generator) for name, shape in sources.items()}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        drawn = torch.rand(shape, generator=generator) + 0.5
    else:
        # Routers choose clearly, embeddings differ, and logits spread over several nats.
        scale = 1.0 if name.endswith("embed_tokens.weight") else shape[1] ** -0.5
        if name.endswith(("gate.weight", "lm_head.weight", "q_proj.weight")):
            scale *= 2
        drawn = torch.randn(shape, generator=generator) * scale
    return drawn.bfloat16().float()


def _import(hf: Path, checkpoint: Path, runtime: Runtime) -> None:
    """Convert on the CPU, as the stage `import` does; rank 0 writes all tensors."""
    plan = ImportPlan(hf, "keep")
    entries = plan.entries if runtime.is_main else []
    save_checkpoint(
        checkpoint,
        planned_state(PlannedShard(*item.place, item.dtype) for item in entries),
        spec=plan.spec,
        hf_files=hf,
        step=None,
        kind="model",
        trainer_state=None,
        runtime=runtime,
        produce=plan.produce,
    )


def draw_groups(lengths: Sequence[Lengths], vocab: int, *, first_token: int = 0, seed: int = 0) -> list[Group]:
    """Draw groups of random tokens, ids in [first_token, vocab), with normal rewards.

    They are the same for the same arguments.
    """
    generator = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(first_token, vocab) for _ in range(count))

    return [
        Group(
            id=f"group-{number}",
            prompt=tokens(each.prompt),
            candidates=tuple(tokens(length) for length in each.candidates),
            rewards=tuple(generator.gauss(0, 1) for _ in each.candidates),
        )
        for number, each in enumerate(lengths)
    ]


def _with_reference(model: PlainModel, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Give the groups reference log-probs at some distance from the model's own."""
    generator = random.Random(1)
    completed = []
    for group in groups:
        logps = plain_logprobs(model, group, temperature=EXO.temperature).tolist()
        moved = tuple(value + generator.gauss(0, REFERENCE_NOISE) for value in logps)
        completed.append(replace(group, reference_logprobs=moved))
    return tuple(completed)
