"""Sides of the comparison of log-probs at equal positions: hidden states to log-probs of targets.

The vocabulary is cut over the tensor group. Every side returns each rank's own gradient of the
hidden states; the all-reduce of it that follows is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor

from exo_megatron.config.sections import ParallelConfig
from exo_megatron.diagnosis.memory import peak_bytes
from exo_megatron.diagnosis.timing import alternate
from exo_megatron.logprobs.softmax import VocabShard, plan_tiles
from exo_megatron.logprobs.vocab_parallel import sharded_logprobs
from exo_megatron.parallel.runtime import Runtime, distributed_runtime, share_object
from exo_megatron.parallel.topology import Topology, model_parallel
from tools.bench.measured import Measured
from tools.bench.sides import Different, agree

NAIVE, MEGATRON, KEPT, RECOMPUTED = "naive", "megatron-core", "ours, kept", "ours, recomputed"
MEMORY_MIB = {KEPT: 1024.0, RECOMPUTED: 4.0}
"""Values of compute.logits_memory_mib of our sides: the default, and one tile of 512 columns."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Size:
    """Sizes: N positions, each with one target; H; V."""

    rows: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"N={self.rows}, H={self.hidden}, V={self.vocab}"


@dataclass(frozen=True)
class Problem:
    """Inputs of all sides on this rank.

    Hidden states [N, H], this rank's weight [V/t, H], targets [N] and the gradient of the log-probs
    [N].
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    topology: Topology
    vocab: int

    @classmethod
    def random(cls, size: Size, topology: Topology) -> Problem:
        """Draw a problem, the same on every rank except for the shard.

        Logits have a standard deviation of 3.
        """
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(size.rows, size.hidden, generator=generator)
        weight = torch.randn(size.vocab, size.hidden, generator=generator) * (3 / size.hidden**0.5)
        targets = torch.randint(size.vocab, (size.rows,), generator=generator)
        upstream = torch.randn(size.rows, generator=generator)
        own = weight.chunk(topology.tensor_size)[topology.tensor_rank].clone()
        device = topology.device
        hidden, own = hidden.to(device).requires_grad_(), own.to(device).requires_grad_()
        return cls(hidden, own, targets.to(device), upstream.to(device), topology, size.vocab)

    def gradients(self, side: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
        """Compute the log-probs of one forward pass, and both gradients of its backward."""
        logps = side(self)
        d_hidden, d_weight = torch.autograd.grad(logps, (self.hidden, self.weight), self.upstream)
        return {"log-probs": logps.detach(), "hidden": d_hidden, "weight": d_weight}

    def work(self, side: Callable[[Problem], Tensor], runtime: Runtime) -> None:
        """Run forward and backward, until every rank has finished."""
        self.gradients(side)
        if runtime.world_size > 1:
            runtime.barrier()


def naive(problem: Problem) -> Tensor:
    """Compute the logits of the whole vocabulary on every rank, keep them, and take torch's
    log-softmax.
    """
    logits = problem.hidden @ problem.weight.t()
    if problem.topology.tensor_size > 1:
        logits = gather_from_tensor_model_parallel_region(logits)
    return torch.log_softmax(logits, dim=-1).gather(-1, problem.targets[:, None])[:, 0]


def megatron(problem: Problem) -> Tensor:
    """Compute the output layer's product and the loss function of megatron-core's GPTModel."""
    logits = problem.hidden @ problem.weight.t()
    loss: Tensor = vocab_parallel_cross_entropy(logits[:, None], problem.targets[:, None])
    return -loss[:, 0]


def ours(problem: Problem, memory_mib: float) -> Tensor:
    """Compute log-probs as `Policy.token_logprobs` does."""
    topology, rows = problem.topology, problem.hidden.shape[0]
    shard = VocabShard(topology.tensor_group, topology.tensor_rank, topology.tensor_size, problem.vocab)
    tiling = plan_tiles(rows, shard.valid(problem.weight.shape[0]), problem.weight, memory_mib=memory_mib)
    token_predictor = torch.arange(rows, device=problem.hidden.device)
    return sharded_logprobs(
        problem.hidden, problem.weight, token_predictor, problem.targets, shard, temperature=1.0, tiling=tiling
    )


SIDES: dict[str, Callable[[Problem], Tensor]] = {
    NAIVE: naive,
    MEGATRON: megatron,
    KEPT: partial(ours, memory_mib=MEMORY_MIB[KEPT]),
    RECOMPUTED: partial(ours, memory_mib=MEMORY_MIB[RECOMPUTED]),
}


def measure(size: Size, rounds: int, tolerance: float) -> Measured | Different:
    """Measure all sides, in every process of a world whose ranks are one tensor group.

    Collective over the world. Returns Different on all ranks if the results of a side differ on one:
    an exception would end the process in the world.
    """
    with (
        distributed_runtime() as runtime,
        model_parallel(runtime, ParallelConfig(tensor=runtime.world_size), seed=0) as topology,
    ):
        problem = Problem.random(size, topology)
        wanted = problem.gradients(naive)
        others = {name: side for name, side in SIDES.items() if name != NAIVE}
        differences, different = {}, ""
        for name, side in others.items():  # on all ranks, whatever one finds
            gradients = problem.gradients(side)
            try:
                differences[name] = agree(gradients, wanted, tolerance=tolerance)
            except Different as difference:
                different = str(difference)
        found = [each for each in share_object(different) if each]
        if found:
            return Different(found[0])
        del wanted
        work = {name: partial(problem.work, side, runtime) for name, side in SIDES.items()}
        peaks = {name: peak_bytes(each) for name, each in work.items()}
        return Measured(alternate(work, rounds=rounds), peaks, differences)
