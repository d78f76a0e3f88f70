"""Head sizes that the attention operator of CUDA cannot take are refused when the model is built, and only there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.errors import ConfigError
from exo_megatron.models.attention import kernels
from exo_megatron.models.attention.dense import CpuFlashKernel, PlainKernel
from exo_megatron.models.attention.kernels import BatchedKernels, FlashVarlenKernels, may_use_flash_varlen
from exo_megatron.models.attention.passes import AttentionPass, ScoreRule
from exo_megatron.models.policy import build_policy, check_attention
from exo_megatron.models.spec import ModelSpec, Rotary

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def spec(head_dim: int, softcap: float | None = None) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=2,
        hidden_size=2 * head_dim,
        ffn_hidden_size=32,
        heads=2,
        kv_heads=2,
        head_dim=head_dim,
        vocab_size=101,
        max_positions=64,
        norm_epsilon=1e-5,
        rotary=Rotary(base=10000.0, dim=4),
        attention_softcap=softcap,
    )


@pytest.mark.parametrize("size", [257, 260, 264, 4, 100])
def test_sizes_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_attention(spec(size), CUDA, ComputeConfig(precision="bf16"))
    assert f"heads of size {size}" in refusal.value.problem
    assert refusal.value.expected == "heads of at most 256, a multiple of 8"
    assert "compute.precision=fp32" in refusal.value.fix


@pytest.mark.parametrize("size", [8, 64, 80, 128, 256])
def test_sizes_that_fit(size: int) -> None:
    check_attention(spec(size), CUDA, ComputeConfig(precision="bf16"))


@pytest.mark.parametrize(
    ("device", "precision", "softcap"),
    [(CPU, "bf16", None), (CPU, "fp32", None), (CUDA, "fp32", None), (CUDA, "bf16", 50.0)],
    ids=["bf16 on the CPU", "fp32 on the CPU", "fp32 on CUDA", "soft cap on CUDA"],
)
def test_other_kernels_take_any_size(device: torch.device, precision: Any, softcap: float | None) -> None:
    check_attention(spec(260, softcap), device, ComputeConfig(precision=precision))


def test_it_is_refused_before_the_model_is_built() -> None:
    """The topology holds no groups: building anything would fail otherwise."""

    @dataclasses.dataclass
    class Place:
        parallel: ParallelConfig
        device: torch.device

    place: Any = Place(ParallelConfig(), CUDA)
    with pytest.raises(ConfigError, match="heads of size 260"):
        build_policy(spec(260), place, ComputeConfig(precision="bf16"))


class _Tensor:
    """What kernels are chosen by: device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype


@pytest.mark.parametrize("device", [CUDA, CPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rule", [ScoreRule(1.0), ScoreRule(1.0, softcap=5.0), ScoreRule(1.0, window=4)])
def test_the_check_follows_the_choice_of_kernels(device: torch.device, dtype: torch.dtype, rule: ScoreRule) -> None:
    """The operator runs only where the check counts with it. In fp32 matrix products run on CUDA."""
    query: Any = _Tensor(device, dtype)
    empty = torch.zeros(0, dtype=torch.int64)
    for longest, causal in ((4, True), (5, True), (5, False)):
        pass_ = AttentionPass(causal, (4,), (4,), (0,), (0,), None, None, empty, empty, empty, empty, longest)
        chosen = kernels.kernels_for(query, pass_, rule)
        cut = rule.window is not None and longest > rule.window
        if isinstance(chosen, BatchedKernels):
            plain = device == CUDA or rule.softcap is not None or cut
            assert isinstance(chosen.dense, PlainKernel if plain else CpuFlashKernel)
        else:
            assert may_use_flash_varlen(device, dtype, softcap=rule.softcap)
        half_on_cuda = device == CUDA and dtype in (torch.bfloat16, torch.float16)
        expected = half_on_cuda and rule.softcap is None and (causal or not cut)
        assert isinstance(chosen, FlashVarlenKernels) == expected
