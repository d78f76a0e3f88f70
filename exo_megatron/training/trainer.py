"""The training loop: steps, metrics, checkpoints, resuming, and stopping on request."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from exo_megatron.checkpoint.directory import list_steps, read_fingerprint, skipped_steps, step_directory
from exo_megatron.checkpoint.load import load_sharded, read_trainer_state, verify_but_records
from exo_megatron.checkpoint.save import SmallFiles, begin_save, check_room, prune
from exo_megatron.config.sections import Section
from exo_megatron.config.stages import AlignConfig, SftConfig
from exo_megatron.data.groups import Group, StepSampler
from exo_megatron.errors import CheckpointError, TrainingDiverged, TryAgainLater
from exo_megatron.parallel.ending import StopRequest, check_same, stop_on_signal
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.training.objectives import MicroBatchObjective
from exo_megatron.training.optimizer import Trainee, learning_rate
from exo_megatron.training.saver import Saver
from exo_megatron.training.step import StepResult, plan_step, train_step
from exo_megatron.utils.metrics import MetricsWriter
from exo_megatron.utils.progress import Progress


def run_identity(data: str, fingerprint: str, seed: int, precision: str, *sections: Section) -> str:
    """Compute the SHA-256 (hex) of the data, the starting weights, the seed and the settings that
    count.

    These are the settings that decide the result. Topology, recomputation and packing are not among
    them: a run may be resumed with others.

    Args:
        data: the `data_digest` of the groups.
        fingerprint: of the starting weights, and of the reference's if there is one.
        seed: of the run.
        precision: compute.precision.
        *sections: the sections of the configuration that decide the result.
    """
    settings = [section.digest_json() for section in sections]
    parts = [data, fingerprint, str(seed), precision, *settings]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


GroupsOfStep = Callable[[Sequence[Group]], Sequence[Group]]
"""Function that completes the groups of one step just before it runs.

A live reference adds its log-probs.
"""


@dataclass(frozen=True)
class Trainer:
    """One training run: its model, objective, data and settings.

    identity: digest of everything that must not change between an interrupted run and its
    continuation (data, objective, optimizer, batch); a checkpoint of another identity is refused.
    """

    trainee: Trainee
    objective: MicroBatchObjective
    groups: Sequence[Group]
    config: SftConfig | AlignConfig
    identity: str
    hf_files: Path
    runtime: Runtime
    label: str
    complete_groups: GroupsOfStep

    def run(self) -> None:
        """Train to the last step, from the newest complete checkpoint in the output directory if
        there is one.

        Collective over the world. Raises TryAgainLater (exit code 75) after saving, if some rank
        was asked to stop; TrainingDiverged on every rank if loss or gradient norm is not finite.
        """
        sampler = StepSampler(
            len(self.groups),
            groups_per_step=self.config.batch.groups,
            epochs=self.config.batch.epochs,
            max_steps=self.config.batch.max_steps,
            seed=self.config.seed,
        )
        if self.runtime.is_main:
            self.config.output.mkdir(parents=True, exist_ok=True)
        first_step = self._resume()
        if first_step < sampler.total_steps:
            check_room(self.config.output, self.trainee.bytes_to_save, self.runtime)
        enabled = self.runtime.is_main
        metrics = MetricsWriter(self.config.output, tensorboard=self.config.log.tensorboard, enabled=enabled)
        progress = Progress(self.label, sampler.total_steps, "steps", enabled=enabled, initial=first_step)
        saver = Saver(self._prune)
        with stop_on_signal() as stop, progress, closing(metrics):
            for step in range(first_step, sampler.total_steps):
                self.runtime.begin(f"{self.label}: step {step + 1}")
                try:
                    result = self._step(step, sampler, metrics, progress, stop, saver)
                except TrainingDiverged:  # on all ranks
                    self._end_save(saver)
                    raise
                done = step + 1
                self._save_if_due(done, saver, result, last=done == sampler.total_steps or result.stop_requested)
                if result.stop_requested and done < sampler.total_steps:
                    raise TryAgainLater(
                        str(self.config.output),
                        f"asked to stop; saved after step {done} of {sampler.total_steps}",
                        expected="the run to go on later",
                        fix="start the same command again",
                    )

    def _step(
        self,
        step: int,
        sampler: StepSampler,
        metrics: MetricsWriter,
        progress: Progress,
        stop: StopRequest,
        saver: Saver,
    ) -> StepResult:
        started = time.monotonic()
        groups = self.complete_groups([self.groups[i] for i in sampler.indices(step)])
        lr = learning_rate(step, sampler.total_steps, self.config.optimizer)
        batches = plan_step(self.trainee, groups, self.objective)
        result = train_step(
            self.trainee,
            batches.microbatches,
            self.objective,
            oversized=batches.oversized,
            learning_rate=lr,
            stop_requested=bool(stop),
            writing=saver.writing,
        )
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise TrainingDiverged(
                f"step {step + 1}",
                f"loss {result.loss}, gradient norm {result.grad_norm}",
                expected="finite numbers",
                fix="lower optimizer.lr or set optimizer.clip_grad, or correct loss.function if it is set; "
                "the last saved checkpoint is sound",
            )
        tokens = sum(group.num_tokens for group in groups)
        rate = tokens / max(time.monotonic() - started, 1e-9)
        if (step + 1) % self.config.log.interval == 0 or step + 1 == sampler.total_steps:
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": lr, **result.statistics}
            values |= {"epoch": sampler.epoch(step + 1), "tokens_per_second": rate}
            values["oversized_groups"] = batches.oversized.count if batches.oversized is not None else 0
            metrics.write(step + 1, values)
        progress.advance(1, loss=f"{result.loss:.4f}", tokens_per_second=f"{rate:.0f}")
        return result

    def _save_if_due(self, step: int, saver: Saver, result: StepResult, *, last: bool) -> None:
        """End the save that is under way where all ranks have written, and begin another where it is time.

        last: this is the last step of this process, which waits for its save.
        """
        interval = self.config.save.interval
        due = last or (interval is not None and step % interval == 0)
        if due or not result.writing:
            self._end_save(saver)
        if due:
            self._begin_save(step, saver)
        if last:
            self._end_save(saver)

    def _end_save(self, saver: Saver) -> None:
        if saver.under_way:
            self.runtime.begin(f"{self.label}: waiting for a save")
            saver.end()

    def _begin_save(self, step: int, saver: Saver) -> None:
        """Copy weights and optimizer state, and let them be written while training goes on."""
        self.runtime.begin(f"{self.label}: saving step {step}")
        save = begin_save(
            step_directory(self._checkpoints, step),
            self.trainee.sharded_state(loading=False),
            SmallFiles(self.trainee.policy.spec, self.hf_files, {"step": step, "identity": self.identity}),
            step=step,
            kind="training",
            runtime=self.runtime,
            snapshot=True,
        )
        saver.begin(save)

    @property
    def _checkpoints(self) -> Path:
        return self.config.output / "checkpoints"

    def _prune(self) -> None:
        if not self.config.save.all_steps and self.runtime.is_main:
            prune(self._checkpoints, self.config.save.keep)
        self.runtime.barrier()

    def _resume(self) -> int:
        """Load the newest complete checkpoint of this run and return its number of steps."""
        for line in skipped_steps(self.config.output) if self.runtime.is_main else ():
            print(f"{self.label}: {line}", flush=True)
        steps = list_steps(self.config.output)
        found = f"{steps[-1][0]} {read_fingerprint(steps[-1][1])}" if steps else "none"
        check_same(self.runtime, {f"the newest step in {self.config.output}": found})
        if not steps:
            return 0
        step, path = steps[-1]
        self.runtime.begin(f"{self.label}: loading step {step}")
        records = verify_but_records(path)
        state = read_trainer_state(path)
        if state["identity"] != self.identity:
            raise CheckpointError(
                str(path),
                "made by a run with other data, loss, optimizer or batch settings",
                expected="the settings that this run was started with",
                fix="restore them, or choose another output",
            )
        self.trainee.load_state(load_sharded(path, self.trainee.sharded_state(loading=True), records))
        if self.runtime.is_main:
            print(f"{self.label}: goes on after step {step}, from {path}", flush=True)
        return step
