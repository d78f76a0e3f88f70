"""The command `prepare`: the data of a stage tokenised ahead of time, and what their lengths mean for it."""

from __future__ import annotations

from functools import partial

from exo_megatron.config.stages import AlignConfig, EvaluateConfig, RolloutConfig, SftConfig
from exo_megatron.data.dataset import load_prompts
from exo_megatron.data.groups import GroupLengths
from exo_megatron.data.length_picture import draw_lengths
from exo_megatron.data.length_report import LengthLimits, report_groups, report_prompts
from exo_megatron.data.prepared import prompt_lengths
from exo_megatron.execution.policy import find_policy, find_tokenizer
from exo_megatron.parallel.ending import on_main
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.stages.align import prepare_align
from exo_megatron.stages.run import say, writing
from exo_megatron.stages.sft import prepare_sft

LENGTHS_PICTURE = "lengths.png"


def prepare_data(config: SftConfig | AlignConfig | RolloutConfig | EvaluateConfig, runtime: Runtime) -> None:
    """Tokenise the data of a stage, and print what their lengths mean. Collective over the world.

    The stage then maps what lies in the cache. Its output gets data_report.json and, for groups, a
    picture. No model is loaded and no device used.
    """
    if isinstance(config, SftConfig | AlignConfig):
        lengths = prepare_sft(config, runtime) if isinstance(config, SftConfig) else prepare_align(config, runtime)
        on_main(runtime, partial(_report, config, lengths))
    else:
        _prepare_prompts(config, runtime)


def _report(config: SftConfig | AlignConfig, lengths: GroupLengths) -> None:
    limits = LengthLimits(
        config.data.max_prompt_tokens,
        config.data.max_completion_tokens,
        config.compute.max_tokens_per_microbatch,
        config.parallel.token_multiple,
        config.batch.groups,
    )
    print("", *report_groups(lengths, limits), "", sep="\n", flush=True)
    picture = config.output / LENGTHS_PICTURE
    writing(config.output, partial(draw_lengths, lengths, limits, picture))
    print(f"wrote {picture}", flush=True)


def _prepare_prompts(config: RolloutConfig | EvaluateConfig, runtime: Runtime) -> None:
    model = config.model if isinstance(config, RolloutConfig) else config.reference
    tokenizer = find_tokenizer(find_policy(model.checkpoint, config.parallel, partial(say, runtime)), config.data)
    prompts = load_prompts(
        config.data, tokenizer, tell=partial(say, runtime), report=config.output, team=runtime.team()
    )
    for line in ("", *report_prompts(prompt_lengths(prompts), config.data.max_prompt_tokens)):
        say(runtime, line)
