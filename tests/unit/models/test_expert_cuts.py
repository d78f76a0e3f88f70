"""Which cuts of experts are refused, and in what words. Needs no process group."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from exo_megatron.config.sections import ParallelConfig
from exo_megatron.errors import ConfigError, TopologyError
from exo_megatron.models.policy import check_topology
from exo_megatron.models.spec import Experts, ModelSpec, Rotary
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel

EXPERTS = Experts(count=6, per_token=2, ffn_hidden_size=42, normalized=True)


def spec(experts: Experts | None = EXPERTS) -> ModelSpec:
    return ModelSpec(
        family="mixtral",
        layers=4,
        hidden_size=64,
        ffn_hidden_size=42,
        heads=12,
        kv_heads=12,
        head_dim=16,
        vocab_size=101,
        max_positions=256,
        norm_epsilon=1e-5,
        rotary=Rotary(base=10000.0, dim=16),
        experts=experts,
    )


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tensor": 2},
        {"tensor": 2, "expert": 2},
        {"tensor": 4, "expert": 2},
        {"expert": 6},
        {"tensor": 2, "expert": 6},
    ],
    ids=str,
)
def test_cuts_that_fit(parallel: dict[str, Any]) -> None:
    """42 units can be cut 2 ways, not 4: four tensor ranks need two parts of experts."""
    check_topology(spec(), ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"expert": 4}, "parallel.expert: 4 does not divide the model's 6 experts"),
        ({"tensor": 4}, "parallel.tensor: 4 with parallel.expert 1 cuts each expert 4 ways"),
        ({"tensor": 2, "expert": 3}, "parallel.expert: 3 neither divides parallel.tensor 2 nor is a multiple of it"),
        ({"tensor": 2, "sequence": False}, "parallel.sequence: false, but every tensor-parallel rank"),
    ],
    ids=str,
)
def test_cuts_that_do_not_fit(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError, match=f"^{re.escape(message)}"):
        check_topology(spec(), ParallelConfig(**parallel))


def test_a_dense_model_has_no_experts_to_cut() -> None:
    with pytest.raises(TopologyError, match=r"^parallel\.expert: 2, but the model \(mixtral\) has no experts"):
        check_topology(spec(None), ParallelConfig(expert=2))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"expert": 4}, "parallel: expert 4 x pipeline 1 = 4 does not divide the world size 6"),
        ({"tensor": 2, "pipeline": 2}, "parallel: tensor 2 x pipeline 2 = 4 does not divide the world size 6"),
        ({"tensor": 3, "expert": 2}, "parallel.expert: 2 neither divides parallel.tensor 3"),
    ],
    ids=str,
)
def test_cuts_that_do_not_fit_the_world(parallel: dict[str, Any], message: str) -> None:
    runtime = Runtime(rank=0, world_size=6, local_rank=0, device=torch.device("cpu"), launcher="single")
    with (
        pytest.raises(TopologyError, match=f"^{re.escape(message)}"),
        model_parallel(runtime, ParallelConfig(**parallel), seed=0),
    ):
        pass


def test_one_expert_with_a_weight_of_one_is_refused() -> None:
    """Its router would get no gradient, and megatron-core refuses it with an exception of its own."""
    with pytest.raises(ConfigError, match="one expert per token"):
        check_topology(spec(EXPERTS.model_copy(update={"per_token": 1})), ParallelConfig())
