"""The list of all checks, with their sizes on each kind of device and the times they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from exo_megatron.config.sections import ParallelConfig
from exo_megatron.diagnosis.checks import DeviceCheck, Outcome
from exo_megatron.diagnosis.decode_speed import check_decode_speed
from exo_megatron.diagnosis.decoding import check_greedy
from exo_megatron.diagnosis.kernels import check_logprobs, check_merge
from exo_megatron.diagnosis.machine import Machine
from exo_megatron.diagnosis.saved import check_loaded, check_resume
from exo_megatron.diagnosis.site import Precision, Site
from exo_megatron.diagnosis.small_models import SmallModel, SmallSizes
from exo_megatron.diagnosis.speed import (
    ON_CPU,
    ON_CUDA,
    ROUNDS,
    SpeedSizes,
    check_host_time,
    check_memory,
    check_sharing,
    check_step_speed,
)
from exo_megatron.diagnosis.steps import check_step
from exo_megatron.diagnosis.work import Lengths, ModelSize, separate_work, shared_work
from exo_megatron.errors import ExoError
from exo_megatron.models.policy import DTYPES, check_topology
from exo_megatron.parallel.runtime import Runtime

Run = Callable[[], Outcome | None]


@dataclass(frozen=True)
class Sizes:
    """Sizes of all checks on one kind of device.

    Attributes:
        small: of the models whose results are compared.
        speed: of what is timed.
        attention: lengths of the groups of the check of attention.
        logprobs: hidden size and vocabulary of the check of log-probs.
        correct_seconds: that a check of correctness takes.
        start_seconds: that a check of speed takes besides the arithmetic it times.
    """

    small: SmallSizes
    speed: SpeedSizes
    attention: tuple[Lengths, ...]
    logprobs: tuple[int, int]
    correct_seconds: float
    start_seconds: float


ON_CPU_GROUPS = (Lengths(11, (5, 7, 3)), Lengths(1, (4, 2)), Lengths(23, (9, 1, 6, 8)), Lengths(6, (12,)))
SIZES = {
    "cpu": Sizes(
        SmallSizes(
            hidden=64,
            ffn=96,
            layers=2,
            head_dim=16,
            vocab=300,
            experts=4,
            groups=ON_CPU_GROUPS,
            max_tokens=36,
        ),
        ON_CPU,
        attention=ON_CPU_GROUPS,
        logprobs=(64, 960),
        correct_seconds=2.0,
        start_seconds=1.0,
    ),
    "cuda": Sizes(
        SmallSizes(
            hidden=128,
            ffn=256,
            layers=2,
            head_dim=64,
            vocab=512,
            experts=8,
            groups=(Lengths(40, (20, 17, 3)), Lengths(1, (12, 5)), Lengths(70, (24, 1, 18, 12)), Lengths(30, (30,))),
            max_tokens=110,
        ),
        ON_CUDA,
        attention=(
            Lengths(110, (50, 37, 3)),
            Lengths(1, (40, 12)),
            Lengths(530, (160, 1, 45, 130)),
            Lengths(64, (64,)),
        ),
        logprobs=(256, 7680),
        correct_seconds=8.0,
        start_seconds=6.0,
    ),
}
"""By type of device. The vocabulary of the log-probs is a multiple of most numbers of ranks."""

EXPECTED_SHARE = 0.2
"""Share of the measured peak with which times are estimated."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def correctness_checks(site: Site, sizes: Sizes) -> list[DeviceCheck]:
    """List the checks of correctness, the cheapest first.

    With n ranks models are cut n ways by tensor parallelism, the steps run with n model copies,
    too, and the experts of a mixture are dealt to the ranks.
    """
    ranks = site.runtime.world_size
    cut, copies = ParallelConfig(tensor=ranks), ParallelConfig()
    runs: dict[str, Run] = {
        f"attention in {name}": partial(
            check_merge, site, DTYPES[name], lengths=sizes.attention, head_dim=sizes.small.head_dim
        )
        for name in PRECISIONS
    }
    hidden, vocab = sizes.logprobs
    runs["log-probs in bf16" + _shown(cut)] = partial(check_logprobs, site, cut, hidden_size=hidden, vocab=vocab)
    for each in PRECISIONS:
        name = f"in {each}{_shown(cut)}"
        runs[f"checkpoint made on the CPU {name}"] = _on_model(site.dense, cut, check_loaded, site, each)
        runs[f"step {name}"] = _on_model(site.dense, cut, check_step, site, each)
        runs[f"greedy decoding {name}"] = _on_model(site.dense, cut, check_greedy, site, each)
        runs[f"save and resume {name}"] = partial(check_resume, site, cut, each)
        if ranks > 1:
            runs[f"step in {each}, DP={ranks}"] = _on_model(site.dense, copies, check_step, site, each)
        dealt = ParallelConfig(expert=ranks)
        runs[f"step of a mixture of experts in {each}{_shown(dealt)}"] = _on_model(
            site.experts, dealt, check_step, site, each
        )
    return [DeviceCheck(name, lambda: sizes.correct_seconds, run) for name, run in runs.items()]


def _shown(parallel: ParallelConfig) -> str:
    sizes = {"TP": parallel.tensor, "EP": parallel.expert}
    return "".join(f", {name}={size}" for name, size in sizes.items() if size > 1)


def _on_model(
    model: SmallModel,
    parallel: ParallelConfig,
    check: Callable[[Site, SmallModel, ParallelConfig, Precision], Outcome | None],
    site: Site,
    precision: Precision,
) -> Run:
    """Make the run of a check, or one that says why the small model cannot be cut that way."""
    try:
        check_topology(model.spec, parallel)
    except ExoError as error:
        return partial(Outcome, "not run", f"{error.where}: {error.problem}", error.expected)
    return partial(check, site, model, parallel, precision)


def speed_checks(runtime: Runtime, sizes: Sizes, machine: Machine) -> list[DeviceCheck]:
    """List the checks of speed and of memory. With n ranks all of them run on n model copies."""
    speed, start = sizes.speed, sizes.start_seconds
    rate = EXPECTED_SHARE * machine.flops
    size = ModelSize.of(speed.trained, "trained")
    step = shared_work(speed.lengths, response_only=True).step_flops(size, live=False) / rate
    checks = [
        DeviceCheck(
            f"step of a {_billions(size)} model",
            lambda: start + (1 + ROUNDS) * step,
            partial(check_step_speed, runtime, speed, machine),
        )
    ]
    for shape in speed.shapes:
        seconds = (1 + ROUNDS) * _sharing_flops(speed, shape) / rate
        checks.append(
            DeviceCheck(
                f"sharing at {shape}", partial(_sum, start, seconds), partial(check_sharing, runtime, speed, shape)
            )
        )
    decoded = ModelSize.of(speed.decoded, "decoded")
    read = decoded.linear * DTYPES[speed.precision].itemsize / machine.bytes_per_second
    return [
        *checks,
        DeviceCheck(
            f"decoding of a {_billions(decoded)} model at K=8",
            lambda: 2 * start + 4 * speed.new_tokens * read,
            partial(check_decode_speed, runtime, speed, machine),
        ),
        DeviceCheck("peak memory of a step", lambda: start + 2 * step, partial(check_memory, runtime, speed)),
        DeviceCheck("host time of a layer", lambda: start, partial(check_host_time, runtime, speed, machine)),
    ]


def _sharing_flops(speed: SpeedSizes, shape: tuple[int, int, int]) -> float:
    """Count the FLOPs of both sides of a check of sharing, once."""
    prompt, length, candidates = shape
    group = Lengths(prompt, (length,) * candidates)
    count = max(1, speed.shared_tokens // (prompt + length * candidates))
    size = ModelSize.of(speed.sharing_model, "shared")
    both = separate_work([group]).flops(size) + shared_work([group], response_only=True).flops(size)
    return 3 * count * both


def _sum(*seconds: float) -> float:
    return sum(seconds)


def _billions(size: ModelSize) -> str:
    parameters = size.linear + 2 * size.head
    return f"{parameters / 1e9:.1f}B" if parameters > 1e8 else f"{parameters / 1e6:.1f}M"
