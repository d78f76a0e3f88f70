"""What is kept of a prompt whose candidates pass later."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.models.layouts.parts import build_prompt_layout
from exo_megatron.models.policy import build_policy
from exo_megatron.parallel.runtime import distributed_runtime
from exo_megatron.parallel.topology import model_parallel
from tests.reference.tiny_spec import TINY_SPEC


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_nothing_is_kept_but_keys_and_values(recompute: Literal["none", "full"]) -> None:
    """Without recomputation the graph holds queries, keys and values anyway, and a copy would be the waste."""
    compute = ComputeConfig(precision="fp32", recompute=recompute)
    with distributed_runtime() as runtime, model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        policy = build_policy(TINY_SPEC, topology, compute)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        layout = build_prompt_layout(range(3, 12), multiple=1)
        policy.train()(layout.input_ids[None], layout.position_ids[None], None, packed_seq_params=layout)
    keys = {number: stored.key for number, stored in layout.shared.layers.items()}
    values = {number: stored.value for number, stored in layout.shared.layers.items()}
    assert sorted(keys) == sorted(values) == [1, 2]
    assert all(each.value.shape == (9, 1, 8) for each in (*keys.values(), *values.values()))
    kept = {each.value.untyped_storage().nbytes() for each in values.values()}
    alone = {9 * 8 * 4}
    assert (kept == alone) == (recompute == "full")
    assert {each.value.untyped_storage().nbytes() for each in keys.values()} == alone or recompute == "none"
