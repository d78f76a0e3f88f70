"""All the work of the example: which runs and toys there are, and how they are spread over the cores.

The end point of every run is kept in a file and not computed again by the same code, so an interrupted example goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from exo_megatron.errors import DataError
from exo_megatron.evaluation.estimates import PromptMeans
from exo_megatron.utils.files import atomic_open
from exo_megatron.utils.progress import Progress
from frontier.bigram import BigramWorld
from frontier.figures import Paths, mode_paths, tail_paths
from frontier.reviews import Reviews, load_reviews
from frontier.sweep import METHODS, Run, World, alike, code_digest, finish_runs, read_means, run_key, write_means
from frontier.theorems import Cosine, OptimumError, measure_cosines, optimum_errors
from frontier.transformer import TransformerWorld, fine_tune, make_model

BETA_PI = 0.5
BIGRAM, TRANSFORMER = "bigram", "transformer-bias"


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        ranks: of bigram policies.
        bigram_betas, transformer_betas: beta_r; each gives an end point.
        transformer_seeds: none for no transformer.
        rates: learning rates of the transformer, tried for each method.
        problems, cosine_K: random problems over which cosines are averaged, and their K.
        worlds: random worlds of Figures 1 and 3.
    """

    K: tuple[int, ...] = (4, 8, 16, 32)
    ranks: tuple[int, ...] = (0, 4)
    bigram_betas: tuple[float, ...] = (4.0, 2.0, 1.4, 1.0, 0.5, 0.25)
    bigram_seeds: tuple[int, ...] = (0, 1, 2)
    bigram_steps: int = 250
    transformer_betas: tuple[float, ...] = (2.0, 1.0, 0.8, 0.65, 0.5)
    transformer_seeds: tuple[int, ...] = (0, 1)
    transformer_steps: int = 400
    rates: tuple[float, ...] = (0.05, 0.1)
    sft_epochs: int = 8
    problems: int = 5
    cosine_K: tuple[int, ...] = (2, 4, 8, 32, 128, 512)
    worlds: int = 16

    def bigram_runs(self) -> list[Run]:
        """The runs with bigram policies."""
        settings = product(self.bigram_seeds, self.ranks, self.K, self.bigram_betas, METHODS)
        return [
            Run(BIGRAM, rank, K, method, BETA_PI, beta, 0.03, self.bigram_steps, 32, seed)
            for seed, rank, K, beta, method in settings
        ]

    def transformer_runs(self) -> list[Run]:
        """The runs with the transformer's bias."""
        settings = product(self.transformer_seeds, self.K, self.transformer_betas, self.rates, METHODS)
        return [
            Run(TRANSFORMER, None, K, method, BETA_PI, beta, rate, self.transformer_steps, 32, seed)
            for seed, K, beta, rate, method in settings
        ]


FULL = Plan()
SMALL = Plan(
    K=(4, 32), ranks=(4,), bigram_betas=(2.0, 1.0, 0.5), bigram_seeds=(0,), bigram_steps=100, transformer_seeds=(),
    problems=1, cosine_K=(2, 32, 512), worlds=4,
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """What all the work found.

    Attributes:
        runs: the end point of every run.
        references: pi_sft at the same test prompts, by the policy's name.
        errors: Theorem 3.1.
        cosines: Theorems 3.2 and 3.3.
        modes, tail: Figures 1 and 3.
    """

    runs: dict[Run, PromptMeans]
    references: dict[str, PromptMeans]
    errors: list[OptimumError]
    cosines: list[Cosine]
    modes: Paths
    tail: Paths


def prepare(output: Path, data: Path | None) -> Reviews:
    """Write the texts below `output`. Raises DataError if there are results from others."""
    file = output / "reviews.json"
    reviews = load_reviews(data)
    if not file.is_file():
        output.mkdir(parents=True, exist_ok=True)
        reviews.save(file)
    elif Reviews.load(file) != reviews:
        raise DataError(
            str(output),
            "has results from other texts",
            expected="an output directory of its own for each",
            fix="choose another --output, or remove this one",
        )
    return reviews


def do_all(output: Path, plan: Plan) -> Results:
    """Do all that is not done yet, on all cores. Progress is on standard error."""
    bigram, transformer = plan.bigram_runs(), plan.transformer_runs()
    references = {each.policy: each for each in (reference_run(runs[0]) for runs in (bigram, transformer) if runs)}
    runs = [*references.values(), *bigram, *transformer]
    missing = [run for run in runs if not _file_of(run, output).is_file()]
    torch.set_num_threads(1)
    with (
        Progress(
            "frontier", len(runs) + 4 + plan.problems, "pieces", enabled=True, initial=len(runs) - len(missing)
        ) as progress,
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool,
    ):

        def submit(function: Callable[..., Any], *arguments: object, pieces: int = 1) -> Future[Any]:
            future = pool.submit(_with_one_thread, function, *arguments)
            future.add_done_callback(lambda _: progress.advance(pieces))
            return future

        try:
            # First what others wait for.
            model = submit(_make_model, output, plan.sft_epochs if transformer else 0)
            waiting = [submit(_do_runs, output, [run]) for run in missing if run.policy == BIGRAM]
            theorem, *figures = submit(optimum_errors), submit(mode_paths, plan.worlds), submit(tail_paths, plan.worlds)
            cosines = [submit(measure_cosines, seed, plan.cosine_K) for seed in range(plan.problems)]
            model.result()
            waiting += [submit(_do_runs, output, each, pieces=len(each)) for each in _side_by_side(missing)]
            for future in waiting:
                future.result()
            errors, (modes, tail) = theorem.result(), (figure.result() for figure in figures)
            found = [cosine for future in cosines for cosine in future.result()]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    means = {run: read_means(_file_of(run, output)) for run in runs}
    at_start = {name: means.pop(run) for name, run in references.items()}
    return Results(means, at_start, errors, found, modes, tail)


def reference_run(run: Run) -> Run:
    """The run that trains nothing in the same world."""
    return replace(run, steps=0)


def _with_one_thread(function: Callable[..., Any], *arguments: object) -> Any:
    torch.set_num_threads(1)
    return function(*arguments)


def _file_of(run: Run, output: Path) -> Path:
    return output / "runs" / f"{run_key(run)}.npz"


def _side_by_side(runs: Sequence[Run]) -> list[list[Run]]:
    """The transformer's runs, those that are alike together, because they share its output layer; the longest first."""
    together: dict[Run, list[Run]] = {}
    for run in runs:
        if run.policy == TRANSFORMER:
            together.setdefault(alike(run), []).append(run)
    return [together[common] for common in sorted(together, key=lambda common: (common.seed, -common.K))]


def _do_runs(output: Path, runs: Sequence[Run]) -> None:
    """Do runs that are alike."""
    means = finish_runs(_find_world(output, runs[0].policy, runs[0].seed), runs)
    for run, each in zip(runs, means, strict=True):
        write_means(_file_of(run, output), each)


@lru_cache(maxsize=1)
def _find_world(output: Path, policy: str, seed: int) -> World[Any]:
    """Make a run's world from the files below `output`, the same in every process."""
    reviews = Reviews.load(output / "reviews.json")
    if policy == BIGRAM:
        return BigramWorld.of(reviews, seed=seed)
    model = make_model(len(reviews.words), seed=0)
    model.load_state_dict(torch.load(_model_file(output), weights_only=True))
    return TransformerWorld.of(reviews, model, seed=seed)


def _model_file(output: Path) -> Path:
    return output / f"model-{code_digest()}.pt"


def _make_model(output: Path, epochs: int) -> None:
    """Fine-tune the transformer on the texts, unless its file is there."""
    file = _model_file(output)
    if epochs and not file.is_file():
        reviews = Reviews.load(output / "reviews.json")
        model = make_model(len(reviews.words), seed=0)
        fine_tune(model, reviews, epochs=epochs, seed=0)
        with atomic_open(file, "wb") as opened:
            torch.save(model.state_dict(), opened)
