"""Does the work of a case on fake CUDA tensors, with the project's own functions, and says what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from exo_megatron.config.sections import ComputeConfig, LossConfig, OptimizerConfig, ParallelConfig, SamplingConfig
from exo_megatron.data.groups import Group
from exo_megatron.data.prompts import Prompt
from exo_megatron.execution.forward import candidate_logprobs
from exo_megatron.execution.policy import Policy
from exo_megatron.models.policy import build_policy
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.native import NativeEngine
from exo_megatron.training import step
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from tests.fake_cuda import collectives
from tests.fake_cuda.cases import Case
from tests.fake_cuda.device import DEVICE
from tests.fake_cuda.experts import answer_splits
from tests.fake_cuda.models import model_spec
from tests.fake_cuda.trace import RECORD
from tests.fake_cuda.watch import Watch
from tests.reference.tiny_llama import EosTokenizer

MICROBATCH = 256
SMALL_MICROBATCH = 24


@dataclass(frozen=True)
class Found:
    """What a case did with the larger of its models.

    operators_per_layer: of a step or of all passes, views left out: by how many more than the smaller model had.
    waits: "phase: what at place" -> number, where the host waits for the device.
    uploads: the same for copies to the device; pageable: those that were not made ahead.
    unsafe: uses of memory that another stream may still write or have taken.
    wide: bytes of the largest fp32 matrix that was made before the optimizer, and where.
    """

    operators_per_layer: float
    collectives: dict[str, int]
    bad_collectives: list[str]
    waits: dict[str, int]
    uploads: dict[str, int]
    pageable: dict[str, int]
    unsafe: dict[str, int]
    wide: tuple[int, str]


def find(case: Case) -> Found:
    """Do the work with the two models of the case."""
    collectives.join(case.world_size, case.rank)
    answer_splits()
    fewer, more = case.layers
    _do(case, fewer)
    with_fewer = RECORD.operators.total()
    _do(case, more)
    return Found(
        (RECORD.operators.total() - with_fewer) / ((more - fewer) / case.pipeline),
        dict(RECORD.collectives),
        RECORD.bad_collectives,
        dict(RECORD.waits),
        dict(RECORD.uploads),
        dict(RECORD.pageable),
        dict(RECORD.unsafe),
        RECORD.wide,
    )


def _do(case: Case, layers: int) -> None:
    runtime = Runtime(case.rank, case.world_size, case.rank, DEVICE, "torchrun")
    parallel = ParallelConfig(tensor=case.tensor, pipeline=case.pipeline, expert=case.expert)
    compute = ComputeConfig(
        precision=case.precision,
        recompute=case.recompute,
        max_tokens_per_microbatch=SMALL_MICROBATCH if case.work == "train_oversized" else MICROBATCH,
    )
    with FakeTensorMode(allow_non_fake_inputs=True), Watch(), model_parallel(runtime, parallel, seed=1) as topology:
        model = build_policy(model_spec(case.family, layers), topology, compute)
        tokenizer: Any = EosTokenizer(0)
        WORK[case.work](Policy(model, topology, compute, tokenizer=tokenizer))


def _train(policy: Policy, groups: list[Group]) -> None:
    trainee = make_trainee(policy, OptimizerConfig())
    objective = AlignObjective.of(LossConfig())
    trainee.optimizer.step()  # Adam allocates its state in the first step of a run
    _mark_phases(trainee)
    RECORD.clear()
    with RECORD.during("plan"):
        batches = step.plan_step(trainee, groups, objective)
    with RECORD.during("end"):
        step.train_step(trainee, batches.microbatches, objective, learning_rate=1e-6, oversized=batches.oversized)


def _mark_phases(trainee: Any) -> None:
    """Forward, loss and backward are "gradients"; what is neither they, their reduction nor the optimizer is "end"."""
    vars(step)["forward_gradients"] = _during("gradients", step.forward_gradients)
    config = trainee.policy.model.config
    config.finalize_model_grads_func = _during("reduction", config.finalize_model_grads_func)
    vars(step)["update_weights"] = _during("optimizer", step.update_weights)


def _during(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with RECORD.during(phase):
            return function(*args, **kwargs)

    return marked


def _decode(policy: Policy) -> None:
    prompts = [Prompt(str(length), "", _tokens(length, 2)) for length in (5, 9, 3)]
    sampling = SamplingConfig(candidates=4, max_new_tokens=6, max_active_candidates=8, top_p=0.95)
    engine = NativeEngine(policy)
    RECORD.clear()
    with RECORD.during("decode"):
        engine.generate(prompts, sampling, seed=1, progress=None)


def _score(policy: Policy) -> None:
    RECORD.clear()
    with RECORD.during("score"):
        candidate_logprobs(policy, GROUPS, temperature=1.0)


def _tokens(count: int, start: int) -> tuple[int, ...]:
    return tuple((7 * place + start) % 499 for place in range(count))


def _group(number: int, prompt: int, candidates: tuple[int, ...]) -> Group:
    return Group(
        str(number),
        _tokens(prompt, number),
        tuple(_tokens(length, 3 * place + number) for place, length in enumerate(candidates)),
        rewards=tuple(0.1 * place for place in range(len(candidates))),
        reference_logprobs=tuple(-1.0 * length for length in candidates),
    )


# Few and short: attention by matrix products takes some operators for each. Together an odd number of tokens, so that
# tensor parallelism pads them. The small micro-batch has room for one.
GROUPS = [_group(1, 9, (5, 7, 3)), _group(2, 5, (2, 2))]
OVERSIZED = _group(4, 10, (8, 9, 7, 3))
WORK: dict[str, Callable[[Policy], None]] = {
    "train": lambda policy: _train(policy, GROUPS),
    "train_oversized": lambda policy: _train(policy, [*GROUPS, OVERSIZED]),
    "decode": _decode,
    "score": _score,
}
