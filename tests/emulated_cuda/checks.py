"""What the ranks with an emulated CUDA device do. Run by tests/multiprocess/harness.py on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional

from exo_megatron.config.sections import ComputeConfig, ParallelConfig
from exo_megatron.models.attention.passes import ScoreRule
from exo_megatron.models.expert_exchange import ExpertShare
from exo_megatron.models.numerics import add_product_, product
from exo_megatron.models.policy import build_policy
from exo_megatron.models.spec import Experts
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from tests.emulated_cuda import emulation, sabotage, strictness
from tests.emulated_cuda.engine import CALLS as ENGINE_CALLS
from tests.emulated_cuda.engine import engine_in_fp32
from tests.multiprocess import align_checks
from tests.multiprocess.align_checks import RankRecord
from tests.reference.tiny_spec import TINY_SPEC
from tests.unit.models.attention.test_kernels import LAYOUTS, RULE, compare, make_layout, random_qkv

WINDOW = ScoreRule(scale=0.37, window=3)


def stage(runtime: Runtime, *, name: str, config: dict[str, Any], flash: bool, engine: bool = False) -> RankRecord:
    """A stage of tests/multiprocess/align_checks.py.

    With `flash` attention takes the flash operator in fp32, too, with `engine` linears are Transformer Engine's.
    """
    if runtime.device.type != "cuda":
        raise ValueError(f"the device is {runtime.device}")
    emulation.CALLS.clear()
    with emulation.flash_in_fp32() if flash else nullcontext(), engine_in_fp32() if engine else nullcontext():
        record: RankRecord = vars(align_checks)[name](runtime, config=config)
    flashes = flash or config["compute"]["precision"] == "bf16"
    if bool(emulation.CALLS["_flash_attention_backward"]) != flashes:
        raise ValueError(f"flash attention: {flashes} expected, called {dict(emulation.CALLS)}")
    if engine and not (ENGINE_CALLS["product"] and ENGINE_CALLS["adam"]):
        raise ValueError(f"of Transformer Engine only {sorted(ENGINE_CALLS)} ran")
    return record


def attention(runtime: Runtime, *, layout: str, dtype: torch.dtype, tolerance: float, flash: bool) -> None:
    """Output and gradients of packed groups on CUDA against a dense mask in fp64."""
    _attention(layout, dtype, tolerance, RULE, flash=flash)


def windows(runtime: Runtime) -> None:
    """A window that cuts the texts."""
    for layout in LAYOUTS:
        _attention(layout, torch.float32, 1e-5, WINDOW, flash=True)


def products(runtime: Runtime) -> dict[str, float]:
    """The largest error of products of half-precision matrices with fp32 sums, to the largest entry."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 5, 300), (2, 300, 7)))
    there = left.to(runtime.device), right.to(runtime.device)
    exact = left.double() @ right.double()
    into = torch.empty(5, 7, device=runtime.device)
    product(there[0][0], there[1][0], out=into)
    total = torch.ones(5, 7, device=runtime.device)
    add_product_(total, there[0][0], there[1][0])
    results = {
        "bmm": (product(*there), exact),
        "mm": (product(there[0][0], there[1][0]), exact[0]),
        "mm, out": (into, exact[0]),
        "added": (total - 1, exact[0]),
    }
    return {
        name: ((ours.cpu() - theirs).abs().max() / theirs.abs().max()).item()
        for name, (ours, theirs) in results.items()
    }


def experts(runtime: Runtime) -> dict[str, float]:
    """The largest errors of experts in bf16 with grouped products, to the largest entries.

    Against fp64 on the CPU. One of the experts has no token; gradients of weights go to fp32 buffers.
    """
    generator = torch.Generator().manual_seed(3)
    counts, dtype = [5, 0, 6], torch.bfloat16
    sizes = Experts(count=3, per_token=1, ffn_hidden_size=32, normalized=False)
    spec = TINY_SPEC.model_copy(update={"experts": sizes})
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        local = build_policy(spec, topology, ComputeConfig(precision="bf16")).decoder.layers[0].mlp.experts
    for parameter in local.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        vars(parameter).update(main_grad=torch.ones(parameter.shape, device="cuda"), grad_added_to_main_grad=False)
    tokens = torch.randn(11, spec.hidden_size, generator=generator).to(dtype)
    weights, gradient = torch.rand(11, generator=generator), torch.randn(tokens.shape, generator=generator).to(dtype)
    there = tokens.to("cuda").requires_grad_()
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    emulation.CALLS.clear()
    output = local(there, ExpertShare(counts, ends, weights.to("cuda")))
    output.backward(gradient.to("cuda"))
    if emulation.CALLS["_grouped_mm"] != 4:
        raise ValueError(f"grouped products: 4 expected, called {dict(emulation.CALLS)}")
    exact = [
        tokens.double().requires_grad_(),
        *(each.detach().cpu().double().requires_grad_() for each in (local.fc1, local.fc2)),
    ]
    parts = []
    for part, share, first, second in zip(
        exact[0].split(counts), weights.split(counts), exact[1], exact[2], strict=True
    ):
        gate, up = (part @ first.t()).chunk(2, dim=-1)
        parts.append((functional.silu(gate) * up * share.double()[:, None]) @ second.t())
    torch.cat(parts).backward(gradient.double())
    found = {"output": output, "tokens": there.grad, "fc1": local.fc1.main_grad - 1, "fc2": local.fc2.main_grad - 1}
    expected = [torch.cat(parts), *(each.grad for each in exact)]
    return {
        name: ((ours.detach().cpu() - theirs).abs().max() / theirs.abs().max()).item()
        for (name, ours), theirs in zip(found.items(), expected, strict=True)
    }


def refusals(runtime: Runtime) -> dict[str, str]:
    """What the operators say to arguments that the real ones refuse; those that are right are accepted."""
    strictness.accepted()
    return strictness.refusals()


def sabotaged(runtime: Runtime, *, name: str) -> str:
    """What the comparison of attention says of a change of the project that it must find; "" if it finds nothing."""
    try:
        with sabotage.CHANGES[name]():
            _attention("ragged groups and padding", torch.float32, 1e-5, RULE, flash=True)
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return ""


def _attention(name: str, dtype: torch.dtype, tolerance: float, rule: ScoreRule, *, flash: bool) -> None:
    groups, multiple = LAYOUTS[name]
    layout = make_layout(groups, multiple).to(torch.device("cuda"))
    with emulation.flash_in_fp32() if flash else nullcontext():
        compare(groups, layout, random_qkv(layout.num_tokens, 4, 2, dtype, "cuda"), tolerance, rule)
