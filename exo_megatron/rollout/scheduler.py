"""Continuous batching: choice of the candidates and prompts that go through the model in each pass.

Pure Python. A prompt is admitted when candidate slots are free: its tokens are prefilled once, and
the logits of its last token give the first token of all its K candidates. They take candidate slots
as these become free (all at once, unless K is larger than the limit), feed one token a pass, and
leave at the end of sequence or at the length limit. Every rank of a model-parallel group runs its
own scheduler on the same draws and so computes the same passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

PROMPT_SLOT_FACTOR = 2
"""Prompt slots per max_active / K: a prompt stays until its slowest candidate is complete."""

T = TypeVar("T")


@dataclass(eq=False)
class ActivePrompt:
    """A prompt in the cache.

    index: its place in the caller's list. unfinished: number of its incomplete candidates.
    """

    index: int
    tokens: tuple[int, ...]
    slot: int = -1
    unfinished: int = 0


@dataclass(eq=False)
class ActiveCandidate:
    """A started candidate: the tokens drawn so far, and the sum of their log-probs in nats."""

    prompt: ActivePrompt
    number: int
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finished: bool = False


@dataclass(frozen=True)
class Pass:
    """One pass, in this order: move cache slots, run the model, draw one token for each of `draws`.

    Attributes:
        candidate_moves, prompt_moves: (source, destination) slots.
        active: candidates in the order of their slots 0..m-1.
        prompts: all prompts in the cache in the order of their slots, `admitted` among them.
        admitted: prompts to prefill in this pass.
        draws: candidate and the place of the logits that it is drawn from (0..m-1 the active ones,
            then one per admitted prompt), place by place.
    """

    candidate_moves: tuple[tuple[int, int], ...]
    prompt_moves: tuple[tuple[int, int], ...]
    active: tuple[ActiveCandidate, ...]
    prompts: tuple[ActivePrompt, ...]
    admitted: tuple[ActivePrompt, ...]
    draws: tuple[tuple[ActiveCandidate, int], ...]


class Scheduler:
    """Scheduler of the passes of generation.

    Call `next_pass`, then `accept` with the drawn tokens, until `next_pass` returns None.
    """

    def __init__(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        candidates: int,
        max_new_tokens: int,
        max_active: int,
        max_prefill_tokens: int,
        ends: Callable[[Sequence[int]], bool],
    ) -> None:
        """Queue all prompts, the longest first.

        Args:
            prompts: token ids.
            candidates: K.
            max_new_tokens: tokens of a candidate at most.
            max_active: candidate slots.
            max_prefill_tokens: prompt tokens that one pass admits (a longer prompt is admitted
                alone).
            ends: tells whether the last of a candidate's tokens ends it.
        """
        # Longest first: prompts in the cache at the same time are then about equally long, and
        # attention reads every prompt slot up to the longest one.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        self._waiting = deque(ActivePrompt(index, prompts[index], unfinished=candidates) for index in order)
        self._ready: deque[ActiveCandidate] = deque()
        self._active: list[ActiveCandidate | None] = []
        self._resident: list[ActivePrompt | None] = []
        self._draws: tuple[tuple[ActiveCandidate, int], ...] = ()
        self._candidates = candidates
        self._max_new_tokens = max_new_tokens
        self._max_active = max_active
        self._max_prefill_tokens = max_prefill_tokens
        self._ends = ends
        self.prompt_slots = min(len(prompts), PROMPT_SLOT_FACTOR * -(-max_active // candidates))

    def next_pass(self) -> Pass | None:
        """Plan the next pass; None when every candidate is complete."""
        running = sum(candidate is not None for candidate in self._active)
        newcomers = [self._ready.popleft() for _ in range(min(len(self._ready), self._max_active - running))]
        active, candidate_moves = _fill_slots(self._active, newcomers)
        admitted = self._admit(self._max_active - len(active) - len(self._ready))
        prompts, prompt_moves = _fill_slots(self._resident, admitted)
        for slot, prompt in enumerate(prompts):
            prompt.slot = slot
        self._active, self._resident = list(active), list(prompts)

        draws = [(candidate, place) for place, candidate in enumerate(active)]
        for place, prompt in enumerate(admitted, start=len(active)):
            draws.extend((ActiveCandidate(prompt, number), place) for number in range(self._candidates))
        self._draws = tuple(draws)
        if not draws:
            return None
        return Pass(
            candidate_moves=tuple(candidate_moves),
            prompt_moves=tuple(prompt_moves),
            active=tuple(active),
            prompts=tuple(prompts),
            admitted=tuple(admitted),
            draws=self._draws,
        )

    def accept(self, tokens: Sequence[int], logprobs: Sequence[float]) -> list[ActiveCandidate]:
        """Record token and log-prob of each draw of the last pass; return completed candidates."""
        completed: list[ActiveCandidate] = []
        held = len(self._active)
        for (candidate, place), token, logprob in zip(self._draws, tokens, logprobs, strict=True):
            candidate.tokens.append(token)
            candidate.logprob += logprob
            candidate.finished = self._ends(candidate.tokens)
            if candidate.finished or len(candidate.tokens) == self._max_new_tokens:
                completed.append(candidate)
                self._release(candidate, place if place < held else None)
            elif place >= held:
                self._ready.append(candidate)
        return completed

    def _release(self, candidate: ActiveCandidate, slot: int | None) -> None:
        if slot is not None:
            self._active[slot] = None
        candidate.prompt.unfinished -= 1
        if candidate.prompt.unfinished == 0:
            self._resident[candidate.prompt.slot] = None

    def _admit(self, free: int) -> list[ActivePrompt]:
        """Take waiting prompts while candidate slots, prompt slots and prefill limit allow."""
        admitted: list[ActivePrompt] = []
        free_prompts = self.prompt_slots - sum(prompt is not None for prompt in self._resident)
        budget = self._max_prefill_tokens
        while self._waiting and free > 0 and len(admitted) < free_prompts:
            budget -= len(self._waiting[0].tokens)
            if admitted and budget < 0:
                break
            admitted.append(self._waiting.popleft())
            free -= self._candidates
        return admitted


def _fill_slots(slots: Sequence[T | None], newcomers: Sequence[T]) -> tuple[list[T], list[tuple[int, int]]]:
    """Put newcomers into empty slots, then close the gaps by moving the last ones in.

    Returns the slots in use and the moves (source, destination). Only old occupants move: newcomers
    have nothing in the cache yet.
    """
    filled = list(slots)
    holes = deque(index for index, occupant in enumerate(slots) if occupant is None)
    for newcomer in newcomers:
        if holes:
            filled[holes.popleft()] = newcomer
        else:
            filled.append(newcomer)
    moves: list[tuple[int, int]] = []
    while holes:
        last = filled.pop()
        if last is None:
            holes.pop()  # the highest hole is the slot just dropped
        else:
            moves.append((len(filled), holes[0]))
            filled[holes.popleft()] = last
    return [occupant for occupant in filled if occupant is not None], moves
