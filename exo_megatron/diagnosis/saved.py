"""Checks of checkpoints: one that was made on the CPU, loaded; and a training that goes on from one."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exo_megatron.checkpoint.directory import step_directory
from exo_megatron.checkpoint.dist_format import sharded_tensors
from exo_megatron.config.sections import (
    BatchConfig,
    ComputeConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    SaveConfig,
)
from exo_megatron.config.stages import AlignConfig
from exo_megatron.data.groups import Group
from exo_megatron.diagnosis.checks import Figure, Outcome, judge
from exo_megatron.diagnosis.plain import plain_logprobs
from exo_megatron.diagnosis.site import BF16_FACTOR, Precision, Site, load_small
from exo_megatron.diagnosis.small_models import EXO, SmallModel
from exo_megatron.diagnosis.steps import ADAM
from exo_megatron.diagnosis.whole import gather_tensors
from exo_megatron.errors import reason
from exo_megatron.execution.forward import candidate_logprobs
from exo_megatron.parallel.ending import on_main
from exo_megatron.parallel.topology import Topology, model_parallel
from exo_megatron.training.objectives import AlignObjective
from exo_megatron.training.optimizer import make_trainee
from exo_megatron.training.trainer import Trainer

LOGPROB_LIMIT_FP32 = 5e-4
"""Nats, of a whole candidate."""
STEPS = 2


def check_loaded(site: Site, model: SmallModel, parallel: ParallelConfig, precision: Precision) -> Outcome | None:
    """Compare the tensors of a CPU-made checkpoint with the loaded model's, bit by bit, and its log-probs.

    Collective over the world.
    """
    with model_parallel(site.runtime, parallel, seed=0) as topology:
        policy = load_small(model, topology, precision)
        linear = type(policy.model.decoder.layers[0].self_attention.linear_qkv).__name__
        weights = gather_tensors(policy.model, model.rules, site.runtime)
        logps = candidate_logprobs(policy, model.groups, temperature=EXO.temperature)
    if weights is None:
        return None
    different = sum(not torch.equal(weights[name].float(), tensor) for name, tensor in model.tensors.items())
    exact = _plain(model, torch.float64)
    error = (_flat(logps) - exact).abs().max()
    limit = LOGPROB_LIMIT_FP32
    if precision == "bf16":
        limit = BF16_FACTOR * float((_plain(model, torch.bfloat16) - exact).abs().max())
    figures = [Figure("tensors that differ", float(different), 0.0), Figure("log-probs", float(error), limit)]
    return judge(figures, note=f"{len(weights)} tensors into {linear}")


def _plain(model: SmallModel, dtype: torch.dtype) -> Tensor:
    plain = model.plain(dtype)
    return torch.cat([plain_logprobs(plain, group, temperature=EXO.temperature) for group in model.groups])


def _flat(logps: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for group in logps for value in group], dtype=torch.float64)


def check_resume(site: Site, parallel: ParallelConfig, precision: Precision) -> Outcome:
    """Train two steps, and once more the second from the checkpoint of the first: equal bit by bit.

    The second training begins with other weights, so that it can only be equal by what it loads.
    Collective over the world.
    """
    place = Path(on_main(site.runtime, lambda: tempfile.mkdtemp(dir=site.directory)))
    whole, resumed = place / "whole", place / "resumed"
    first = Path("checkpoints") / step_directory(Path(), 1)
    try:
        with model_parallel(site.runtime, parallel, seed=0) as topology, _deterministic():
            wanted = _train(site, topology, whole, precision, fresh=True)
            on_main(site.runtime, lambda: _copy(whole / first, resumed / first))
            found = _train(site, topology, resumed, precision, fresh=False)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return Outcome("not run", reason(error), "kernels that add in a fixed order")
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    moments = sum("optimizer" in name for name in different)
    figures = [Figure("weights that differ", len(different) - moments, 0.0), Figure("optimizer state", moments, 0.0)]
    return judge(figures, note=f"{len(wanted)} tensors")


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _train(site: Site, topology: Topology, output: Path, precision: Precision, *, fresh: bool) -> dict[str, Tensor]:
    """Run `align` to the last step and return copies of all that it would save on this rank.

    fresh: with the weights of the checkpoint, else with zeros.
    """
    model = site.dense
    policy = load_small(model, topology, precision)
    if not fresh:
        for parameter in policy.model.parameters():
            parameter.detach().zero_()
    config = AlignConfig(
        output=output,
        model=ModelConfig(checkpoint=model.checkpoint),
        data=DataConfig(path="drawn by doctor"),
        loss=EXO,
        parallel=topology.parallel,
        compute=ComputeConfig(precision=precision, max_tokens_per_microbatch=model.max_tokens),
        optimizer=ADAM,
        batch=BatchConfig(groups=2, max_steps=STEPS),
        save=SaveConfig(interval=1, all_steps=True),
        log=LogConfig(tensorboard=False),
    )
    trainer = Trainer(
        trainee=make_trainee(policy, ADAM),
        objective=AlignObjective.of(EXO),
        groups=model.groups,
        config=config,
        identity="doctor",
        hf_files=model.hf,
        runtime=site.runtime,
        label="doctor",
        complete_groups=_as_they_are,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.run()
    state = trainer.trainee.sharded_state(loading=False)
    return {
        f"{leaf.key} {tuple(leaf.global_offset)}": leaf.data.detach().cpu().clone() for leaf in sharded_tensors(state)
    }


def _as_they_are(groups: Sequence[Group]) -> Sequence[Group]:
    return groups


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Let kernels that may add in any order, such as flash attention's backward, use a fixed one.

    Not with `warn_only`, with which torch leaves that backward as it is. A kernel that has no fixed
    order raises RuntimeError.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with _variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8"):  # which torch asks for; one stream is in order anyway
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable in a block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
