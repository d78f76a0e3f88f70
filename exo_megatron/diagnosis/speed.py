"""Checks of training speed: a step against the device's products, and prompt sharing against its formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from exo_megatron.config.sections import ComputeConfig, LossConfig, OptimizerConfig, ParallelConfig
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.checks import Outcome, fast_enough
from exo_megatron.diagnosis.likelihood import WeightedLikelihood, unshared
from exo_megatron.diagnosis.machine import Machine
from exo_megatron.diagnosis.memory import peak_bytes
from exo_megatron.diagnosis.site import Precision
from exo_megatron.diagnosis.small_models import draw_groups
from exo_megatron.diagnosis.timing import alternate, finish, timed
from exo_megatron.diagnosis.work import Lengths, ModelSize, separate_work, shared_work
from exo_megatron.execution.policy import Policy
from exo_megatron.models.policy import DTYPES, build_policy
from exo_megatron.models.spec import ModelSpec, Rotary
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.training.objectives import AlignObjective, MicroBatchObjective
from exo_megatron.training.optimizer import Trainee, make_trainee
from exo_megatron.training.step import forward_gradients, plan_step, train_step

PEAK_SHARE = 0.85
"""Share of the device's own products that a step is to reach."""
MFU = 0.55
SHARING_SHARE = 0.97
"""Share of the formula that sharing is to reach in bf16."""
MEMORY_FACTOR = 1.1
ROUNDS = 3
STEP_OPTIMIZER = OptimizerConfig(lr=1e-6)
SharingShape = tuple[int, int, int]
"""Prompt, candidate length, K."""


@dataclass(frozen=True)
class SpeedSizes:
    """Sizes of the speed checks.

    Attributes:
        precision: of all of them.
        trained: the model that is trained.
        groups: P, R, K and the number of groups of a step, of each rank.
        max_tokens: of a micro-batch of that step.
        shared_layers: layers of the model with which sharing is timed.
        shapes: at which it is.
        shared_tokens: about so many a step with shared prompts; at least one group.
        decoded: the model that decodes.
        prompt, new_tokens: of decoding, with K = 8.
    """

    precision: Precision
    trained: ModelSpec
    groups: tuple[int, int, int, int]
    max_tokens: int
    shared_layers: int
    shapes: tuple[SharingShape, ...]
    shared_tokens: int
    decoded: ModelSpec
    prompt: int
    new_tokens: int

    @property
    def sharing_model(self) -> ModelSpec:
        """The trained model with few layers and a vocabulary that costs nothing."""
        return self.trained.model_copy(update={"layers": self.shared_layers, "vocab_size": 512})

    @property
    def lengths(self) -> list[Lengths]:
        """Lengths of the groups of a step, on one rank."""
        prompt, length, candidates, count = self.groups
        return [Lengths(prompt, (length,) * candidates)] * count


def llama_spec(*, hidden: int, layers: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> ModelSpec:
    """Describe a Llama with untied output weights."""
    return ModelSpec(
        family="llama",
        layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_positions=32768,
        norm_epsilon=1e-5,
        rotary=Rotary(base=10000.0, dim=hidden // heads),
    )


ON_CUDA = SpeedSizes(
    precision="bf16",
    trained=llama_spec(hidden=2048, layers=22, ffn=5632, heads=32, kv_heads=4, vocab=32000),  # 1.1B
    groups=(400, 50, 8, 20),
    max_tokens=8192,
    shared_layers=4,
    shapes=((400, 50, 4), (400, 50, 8), (2048, 256, 8), (16384, 64, 8)),
    shared_tokens=16384,
    decoded=llama_spec(hidden=4096, layers=32, ffn=11008, heads=32, kv_heads=32, vocab=32000),  # 7B
    prompt=400,
    new_tokens=48,
)
ON_CPU = SpeedSizes(
    precision="fp32",
    trained=llama_spec(hidden=128, layers=2, ffn=256, heads=4, kv_heads=2, vocab=512),
    groups=(40, 5, 8, 4),
    max_tokens=256,
    shared_layers=1,
    shapes=((40, 5, 4), (40, 5, 8), (64, 8, 8), (256, 4, 8)),
    shared_tokens=128,
    decoded=llama_spec(hidden=128, layers=2, ffn=256, heads=4, kv_heads=4, vocab=512),
    prompt=40,
    new_tokens=6,
)


def random_policy(spec: ModelSpec, topology: Topology, compute: ComputeConfig) -> Policy:
    """Build a model with random weights on its device."""
    model = build_policy(spec, topology, compute)
    for parameter in model.parameters():
        weight = parameter.detach()
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, weight.shape[1] ** -0.5)
    return Policy(model, topology, compute)


def steps_groups(sizes: SpeedSizes, topology: Topology) -> list[Group]:
    """Draw the groups of a step of all ranks, with rewards and reference log-probs."""
    lengths = sizes.lengths * topology.data_size
    drawn = draw_groups(lengths, sizes.trained.vocab_size)
    return [replace(group, reference_logprobs=(0.0,) * len(group.candidates)) for group in drawn]


def run_step(trainee: Trainee, groups: Sequence[Group], objective: MicroBatchObjective) -> None:
    """Run one optimizer step, from packing to Adam."""
    batches = plan_step(trainee, groups, objective)
    train_step(trainee, batches.microbatches, objective, oversized=batches.oversized, learning_rate=STEP_OPTIMIZER.lr)


def check_step_speed(runtime: Runtime, sizes: SpeedSizes, machine: Machine) -> Outcome:
    """Time steps: share of the measured peak, and MFU.

    Effective MFU counts the FLOPs of sequences that do not share their prompts, every position
    projected, as a trainer without groups would run them. Collective over the world, all of it
    data-parallel.
    """
    size = ModelSize.of(sizes.trained, "trained")
    executed, effective = (
        work.step_flops(size, live=False)
        for work in (shared_work(sizes.lengths, response_only=True), separate_work(sizes.lengths))
    )
    objective = AlignObjective.of(LossConfig())
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        compute = ComputeConfig(precision=sizes.precision, max_tokens_per_microbatch=sizes.max_tokens)
        trainee = make_trainee(random_policy(sizes.trained, topology, compute), STEP_OPTIMIZER)
        step = partial(run_step, trainee, steps_groups(sizes, topology), objective)
        seconds = alternate({"step": step}, rounds=ROUNDS).median("step")
    shares = executed / seconds / machine.flops, executed / seconds / machine.mfu_flops
    effective_mfu, effective_target = effective / seconds / machine.mfu_flops, MFU * effective / executed
    known = "" if machine.sheet_flops is not None else " (of the measured peak)"
    seen = f"{shares[0]:.0%} of the products' peak; MFU{known} {shares[1]:.0%}, effective {effective_mfu:.0%}"
    fast = shares[0] >= PEAK_SHARE and shares[1] >= MFU
    return fast_enough(fast, seen, f"at least {PEAK_SHARE:.0%}; {MFU:.0%}, effective {effective_target:.0%}")


def check_sharing(runtime: Runtime, sizes: SpeedSizes, shape: SharingShape) -> Outcome:
    """Time forward and backward with separate sequences over shared prompts, against the formula.

    Collective over the world, all of it data-parallel.
    """
    prompt, length, candidates = shape
    spec = sizes.sharing_model
    size = replace(ModelSize.of(spec, "shared"), head=0)
    lengths = [Lengths(prompt, (length,) * candidates)]
    ideal = separate_work(lengths).flops(size) / shared_work(lengths, response_only=True).flops(size)
    group_tokens = prompt + length * candidates
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        tokens = max(sizes.shared_tokens, group_tokens)
        compute = ComputeConfig(precision=sizes.precision, max_tokens_per_microbatch=tokens)
        trainee = make_trainee(random_policy(spec, topology, compute), STEP_OPTIMIZER)
        count = tokens // group_tokens * topology.data_size
        groups = draw_groups([Lengths(prompt, (length,) * candidates)] * count, spec.vocab_size)
        sides = {"off": _prepared(trainee, unshared(groups)), "on": _prepared(trainee, groups)}
        ratio = alternate(sides, rounds=ROUNDS).ratio("off", "on")
    reached = ratio / ideal
    seen, expected = f"{ratio:.2f} times as fast, {reached:.0%}", f"{ideal:.2f}, at least {SHARING_SHARE:.0%}"
    return fast_enough(reached >= SHARING_SHARE, seen, expected)


def _prepared(trainee: Trainee, groups: Sequence[Group]) -> Callable[[], object]:
    """Pack the groups, and return forward and backward of the step as a function."""
    objective = WeightedLikelihood()
    batches = plan_step(trainee, groups, objective)
    return partial(forward_gradients, trainee, batches.microbatches, objective, batches.oversized)


def check_memory(runtime: Runtime, sizes: SpeedSizes) -> Outcome:
    """Measure the peak of building the model and of two steps, against what must be there.

    Collective over the world, all of it data-parallel.
    """
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        compute = ComputeConfig(precision=sizes.precision, max_tokens_per_microbatch=sizes.max_tokens)
        groups, objective = steps_groups(sizes, topology), AlignObjective.of(LossConfig())

        def work() -> None:
            trainee = make_trainee(random_policy(sizes.trained, topology, compute), STEP_OPTIMIZER)
            for _ in range(2):
                run_step(trainee, groups, objective)

        peak = peak_bytes(work)
        wanted = expected_bytes(sizes, topology.data_size)
    enough = peak <= MEMORY_FACTOR * wanted
    return Outcome(
        "passed" if enough else "more than expected",
        f"{peak / 2**30:.3g} GiB",
        f"{wanted / 2**30:.3g} GiB, at most {MEMORY_FACTOR} of it",
    )


def expected_bytes(sizes: SpeedSizes, data_size: int) -> float:
    """Compute the bytes of a step that must be there at once.

    Per parameter: the weight, its gradient in fp32, and on one of the data-parallel ranks two moments
    in fp32 and, for bf16, a copy of the weight in fp32. Per token of a micro-batch and layer: inputs of
    both norms, their outputs, queries, keys and values before and after the rotation, the output of
    attention, both halves of the gated activation and their product. And the kept logits.
    """
    spec, width = sizes.trained, DTYPES[sizes.precision].itemsize
    size = ModelSize.of(spec, "")
    parameters = size.linear + 2 * size.head
    of_parameter = width + 4 + (8 + (4 if width < 4 else 0)) / data_size
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    of_token = 4 * spec.hidden_size + (query + 2 * key) + (query + key) + query + 3 * spec.ffn_hidden_size
    work = shared_work(sizes.lengths, response_only=True)
    tokens = min(sizes.max_tokens, work.tokens)
    logits = work.projected * tokens / work.tokens * spec.vocab_size * width
    kept = min(logits, ComputeConfig().logits_memory_mib * 2**20)
    return parameters * of_parameter + tokens * spec.layers * of_token * width + kept


def check_host_time(runtime: Runtime, sizes: SpeedSizes, machine: Machine) -> Outcome:
    """Measure how long the host takes to issue a layer's forward and backward, with few tokens.

    A device that multiplies at its peak needs longer for a layer of a full micro-batch, or it waits
    for the host. Collective over the world, all of it data-parallel.
    """
    group = draw_groups([Lengths(8, (4, 4))], sizes.trained.vocab_size)
    with model_parallel(runtime, ParallelConfig(), seed=0) as topology:
        compute = ComputeConfig(precision=sizes.precision, max_tokens_per_microbatch=sizes.max_tokens)
        trainee = make_trainee(random_policy(sizes.trained, topology, compute), STEP_OPTIMIZER)
        issue = _prepared(trainee, group * topology.data_size)
        issue()
        finish()
        seconds = min(timed(issue, wait=False) for _ in range(ROUNDS)) / sizes.trained.layers
    layer = replace(ModelSize.of(sizes.trained, ""), head=0)
    full = shared_work(sizes.lengths, response_only=True)
    share = min(1.0, sizes.max_tokens / full.tokens)
    needed = full.step_flops(layer, live=False) * share / sizes.trained.layers / machine.flops
    tokens = min(sizes.max_tokens, full.tokens)
    expected = f"at most {1e3 * needed:.2f} ms, which {tokens} tokens take at the products' peak"
    return fast_enough(seconds <= needed, f"{1e3 * seconds:.2f} ms", expected)
