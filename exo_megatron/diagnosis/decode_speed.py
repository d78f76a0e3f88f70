"""Check of the speed of decoding against one read of the weights a pass."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from exo_megatron.config.sections import ComputeConfig, ParallelConfig, SamplingConfig
from exo_megatron.data.prompts import Prompt
from exo_megatron.diagnosis.checks import Outcome, fast_enough
from exo_megatron.diagnosis.decoding import endless_tokens
from exo_megatron.diagnosis.machine import Machine
from exo_megatron.diagnosis.speed import SpeedSizes, random_policy
from exo_megatron.diagnosis.timing import timed
from exo_megatron.diagnosis.work import ModelSize
from exo_megatron.execution.policy import Policy
from exo_megatron.models.policy import DTYPES
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.native import NativeEngine

CANDIDATES = 8
FLOOR_FACTOR = 1.4
"""A pass may take this many times as long as one read of the weights."""
SPARE_MEMORY = 1.2
"""Memory that must be free, over that of the weights."""


def check_decode_speed(runtime: Runtime, sizes: SpeedSizes, machine: Machine) -> Outcome:
    """Time passes of K = 8 candidates of one prompt, on every rank by itself.

    The floor is the read of all weights but the embeddings' at the speed of a copy. Collective over
    the world.
    """
    size, width = ModelSize.of(sizes.decoded, ""), DTYPES[sizes.precision].itemsize
    read, held = (size.linear + size.head) * width, (size.linear + 2 * size.head) * width
    free = runtime.broadcast_object(_free_bytes(runtime.device))
    if free is not None and free < SPARE_MEMORY * held:
        return Outcome("not run", f"{free / 1e9:.0f} GB are free", f"{SPARE_MEMORY * held / 1e9:.0f} GB")
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        policy = random_policy(sizes.decoded, topology, ComputeConfig(precision=sizes.precision))
        policy = replace(policy, tokenizer=endless_tokens(sizes.decoded.vocab_size))
        short, long = (partial(_decode, policy, sizes.prompt, count) for count in (2, 2 + sizes.new_tokens))
        short()
        before = min(timed(short) for _ in range(2))
        seconds = (timed(long) - before) / sizes.new_tokens
    rate, floor = CANDIDATES / seconds, CANDIDATES * machine.bytes_per_second / read
    least = floor / FLOOR_FACTOR
    return fast_enough(
        rate >= least,
        f"{rate:,.0f} tokens a second, a pass takes {floor / rate:.2f} times the floor",
        f"at least {least:,.0f}, {FLOOR_FACTOR} times; the floor is one read of {read / 1e9:.3g} GB a pass",
    )


def _free_bytes(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _decode(policy: Policy, prompt: int, new_tokens: int) -> None:
    """Draw K candidates of so many tokens for one prompt."""
    prompts = [Prompt(id="prompt", text="", ids=tuple(range(1, 1 + prompt)))]
    sampling = SamplingConfig(candidates=CANDIDATES, temperature=1.0, max_new_tokens=new_tokens)
    NativeEngine(policy).generate(prompts, sampling, seed=0, progress=None)
