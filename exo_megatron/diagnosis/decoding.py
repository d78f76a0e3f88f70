"""Check of the rollout engine: greedy decoding, judged by the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from exo_megatron.config.sections import ParallelConfig, SamplingConfig
from exo_megatron.data.prompts import Prompt
from exo_megatron.data.text import Chat
from exo_megatron.data.tokenizer import Tokenizer
from exo_megatron.diagnosis.checks import Figure, Outcome, judge
from exo_megatron.diagnosis.plain import PlainModel
from exo_megatron.diagnosis.site import BF16_FACTOR, Precision, Site, load_small
from exo_megatron.diagnosis.small_models import SmallModel
from exo_megatron.errors import DataError
from exo_megatron.parallel.topology import model_parallel
from exo_megatron.rollout.engine import GeneratedCandidate
from exo_megatron.rollout.native import NativeEngine

GREEDY = SamplingConfig(candidates=3, temperature=1.0, top_p=1e-9, max_new_tokens=10, max_active_candidates=5)
"""So small a top_p leaves the most likely token alone. Five candidates at once: slots move."""
LIMIT_FP32 = 1e-3
"""Nats: a token may be this much less likely than the most likely one."""


@dataclass(frozen=True)
class NoText:
    """A codec of models that have ids and no text: no token ends a candidate. See TextCodec."""

    ids: frozenset[int]
    special_ids: frozenset[int] = frozenset()
    eos_id: int = -1
    prefix_ids: tuple[int, ...] = ()
    description: str = ""

    def encode(self, text: str, *, continuation: bool) -> list[int]:
        """Refuse text."""
        raise _NO_TEXT

    def encode_batch(self, texts: Sequence[str], *, continuation: bool) -> list[list[int]]:
        """Refuse texts."""
        raise _NO_TEXT

    def decode(self, ids: Sequence[int], *, continuation: bool) -> str:
        """Refuse to write text."""
        raise _NO_TEXT

    def show(self, ids: Sequence[int]) -> str:
        """Refuse to write text."""
        raise _NO_TEXT

    def render(self, chat: Chat, *, generation_prompt: bool) -> str:
        """Refuse messages."""
        raise _NO_TEXT


_NO_TEXT = DataError("doctor", "its models have no text", expected="token ids", fix="give token ids")


def endless_tokens(vocab: int) -> Tokenizer:
    """Make a tokenizer for drawing ids that never end by themselves."""
    return Tokenizer(Path("doctor"), NoText(frozenset(range(vocab))))


def check_greedy(site: Site, model: SmallModel, parallel: ParallelConfig, precision: Precision) -> Outcome | None:
    """Decode greedily, K times the same, and ask the plain model how good each token is.

    Collective over the world.
    """
    prompts = [Prompt(id=group.id, text="", ids=group.prompt) for group in model.groups]
    with model_parallel(site.runtime, parallel, seed=0) as topology:
        policy = replace(load_small(model, topology, precision), tokenizer=endless_tokens(model.spec.vocab_size))
        groups = NativeEngine(policy).generate(prompts, GREEDY, seed=0, progress=None)
    if not site.runtime.is_main:
        return None
    drawn = [(p.ids, each) for p, group in zip(prompts, groups, strict=True) for each in group.candidates]
    exact = [_lines(model.plain(torch.float64), *each) for each in drawn]
    limit = LIMIT_FP32
    if precision == "bf16":
        plain = model.plain(torch.bfloat16)
        rough = max(float((_lines(plain, *each) - lines).abs().max()) for each, lines in zip(drawn, exact, strict=True))
        limit = BF16_FACTOR * rough
    regret = max(_regret(lines, each.token_ids) for (_, each), lines in zip(drawn, exact, strict=True))
    error = max(_error(lines, each) for (_, each), lines in zip(drawn, exact, strict=True))
    # The chosen token and the most likely one may each be wrong by the limit.
    figures = [Figure("below the most likely token", regret, 2 * limit), Figure("log-prob a token", error, limit)]
    return judge(figures, note=f"{sum(len(each.token_ids) for _, each in drawn)} tokens")


def _lines(model: PlainModel, prompt: tuple[int, ...], candidate: GeneratedCandidate) -> Tensor:
    """Compute the log-probs of all tokens at each place of a candidate, [R, V] fp64."""
    return model.logprobs((*prompt, *candidate.token_ids), first=len(prompt))[:-1].double()


def _regret(lines: Tensor, tokens: Sequence[int]) -> float:
    """Compute by how many nats the tokens are at most less likely than the most likely ones."""
    chosen = lines.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((lines.amax(-1) - chosen).max())


def _error(lines: Tensor, candidate: GeneratedCandidate) -> float:
    """Compute the error of the log-prob that the engine reports, per token."""
    chosen = lines.gather(1, torch.tensor(candidate.token_ids)[:, None]).sum()
    return abs(candidate.logprob - float(chosen)) / len(candidate.token_ids)
