"""The `evaluate` stage: reward and KL of checkpoints, as numbers, as a picture and as a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from exo_megatron.config.sections import RewardConfig
from exo_megatron.config.stages import EvaluateConfig
from exo_megatron.data.candidates import CandidateRecord, least_bytes, write_candidates
from exo_megatron.data.completions import column_names
from exo_megatron.evaluation.estimates import Estimate, PromptMeans, average_samples, estimate
from exo_megatron.evaluation.picture import draw_frontier
from exo_megatron.evaluation.prompt_means import write_prompt_means
from exo_megatron.evaluation.report import render_report
from exo_megatron.evaluation.samples import Compared, Sampler
from exo_megatron.evaluation.targets import Plan, describe_disagreement, make_plan
from exo_megatron.parallel.ending import check_same, on_main
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rewards.build import build_reward
from exo_megatron.rewards.records import score_records
from exo_megatron.rewards.source import RewardSource
from exo_megatron.stages.run import say
from exo_megatron.utils.disk import check_space
from exo_megatron.utils.files import write_json, write_text

EVALUATION_FILE = "evaluation.json"
PICTURE_FILE = "frontier.png"
REPORT_FILE = "report.html"
PROMPTS_FILE = "prompts.jsonl"
SAMPLES_DIRECTORY = "samples"


def run_evaluate(config: EvaluateConfig, runtime: Runtime) -> None:
    """Write evaluation.json, frontier.png, report.html, all samples with rewards, and prompts.jsonl.

    Collective over the world. Every checkpoint draws sampling.candidates candidates for each
    prompt. Errors in checkpoints, prompts, sizes and the reward source are raised before the first
    model is loaded.
    """
    plan = make_plan(config, partial(say, runtime), runtime.team())
    check_same(runtime, plan.digests())
    disagreement = describe_disagreement(plan, config.sampling.temperature)
    if disagreement is not None:
        say(runtime, f"evaluate: {disagreement}")
    source = build_reward(config.reward, runtime.device, partial(say, runtime))
    models, prompts = len(plan.targets) + 1, len(plan.prompts)
    needed = least_bytes(models * prompts, config.sampling.candidates)
    on_main(runtime, lambda: check_space(config.output, needed))
    if runtime.is_main:
        (config.output / SAMPLES_DIRECTORY).mkdir(parents=True, exist_ok=True)
    estimates: list[Estimate] = []
    means: list[PromptMeans] = []
    last: dict[str, Sequence[CandidateRecord]] = {}
    with model_parallel(runtime, config.parallel, seed=config.seed) as topology:
        for compared, scored in _score_all(
            Sampler(config, plan, topology, runtime).run(), source, config.reward, runtime
        ):
            target = compared.drawn.target
            by_prompt = average_samples(scored, compared.drawn.logprobs, compared.reference_logprobs)
            found = estimate(target.name, target.step, scored, by_prompt)
            write_candidates(_samples_file(config.output, found), scored)
            print(_line(found), flush=True)
            estimates.append(found)
            means.append(by_prompt)
            last[target.name] = scored
    if runtime.is_main:
        write_prompt_means(config.output / PROMPTS_FILE, estimates, means)
        _write_results(config, describe_settings(config, plan), estimates, last)


def _score_all(
    compared: Iterator[Compared], source: RewardSource, reward: RewardConfig, runtime: Runtime
) -> Iterator[tuple[Compared, list[CandidateRecord]]]:
    """Yield every checkpoint's samples with rewards: all ranks do the work, rank 0 gets them."""
    for each in compared:
        records = each.drawn.records
        scored = score_records(records, source, runtime, names=column_names(records), batch_size=reward.batch_size)
        if scored is not None:
            yield each, scored


def describe_settings(config: EvaluateConfig, plan: Plan) -> dict[str, object]:
    """Return the settings that another evaluation must share with this one to be comparable."""
    return {
        "reference": str(plan.reference.source.path),
        "data": config.data.path,
        "prompts": len(plan.prompts),
        "samples": config.sampling.candidates,
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "max_new_tokens": config.sampling.max_new_tokens,
        "seed": config.seed,
        "reward": config.reward.function or str(config.reward.path),
    }


def _samples_file(output: Path, found: Estimate) -> Path:
    name = found.name if found.step is None else f"{found.name}-step-{found.step:08d}"
    return output / SAMPLES_DIRECTORY / f"{name}.jsonl"


def _line(found: Estimate) -> str:
    name = found.name if found.step is None else f"{found.name} step {found.step}"
    return (
        f"{name}: reward {found.reward:.4f} ± {found.reward_stderr:.4f}, "
        f"KL {found.kl:.4f} ± {found.kl_stderr:.4f} nats ({found.prompts} prompts x {found.samples} samples)"
    )


def _write_results(
    config: EvaluateConfig,
    settings: Mapping[str, object],
    estimates: Sequence[Estimate],
    last: Mapping[str, Sequence[CandidateRecord]],
) -> None:
    write_json(config.output / EVALUATION_FILE, {"settings": settings, "checkpoints": [asdict(e) for e in estimates]})
    draw_frontier(estimates, config.output / PICTURE_FILE)
    page = render_report(
        estimates,
        last,
        picture=(config.output / PICTURE_FILE).read_bytes(),
        settings=settings,
        shown_prompts=config.sample_texts,
    )
    write_text(config.output / REPORT_FILE, page)
