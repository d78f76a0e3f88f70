"""Objects of several ranks: what travels, over which group, and in how large messages."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exo_megatron.checkpoint.dist_format import PlannedShard, plan_writing, planned_state
from exo_megatron.data.candidates import Candidate, CandidateRecord
from exo_megatron.data.prompts import Prompt
from exo_megatron.parallel import runtime as module
from exo_megatron.parallel.ending import failing_together, on_main
from exo_megatron.parallel.runtime import Runtime, objects_group, share_object
from exo_megatron.rewards.records import score_records
from exo_megatron.rollout import generate
from exo_megatron.rollout.engine import GeneratedCandidate, GeneratedGroup

OBJECT_COLLECTIVES = (
    "broadcast_object_list",
    "gather_object",
    "all_gather_object",
    "scatter_object_list",
    "send",
    "recv",
)


class Seen:
    """Groups of the collectives that ran, and the bytes of the largest object."""

    def __init__(self) -> None:
        self.groups: list[Any] = []
        self.names: list[str] = []
        self.largest = 0

    @contextmanager
    def watching(self) -> Any:
        """Record the collectives of a block."""
        originals = {name: getattr(dist, name) for name in OBJECT_COLLECTIVES}
        try:
            for name, original in originals.items():
                setattr(dist, name, partial(self._run, name, original))
            yield self
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _run(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.groups.append(kwargs.get("group"))
        self.names.append(name)
        if not args:  # torch's own calls, by keyword; only their group is looked at
            return original(**kwargs)
        sent = args[1] if name == "all_gather_object" else args[0]
        size = sent.numel() * sent.element_size() if isinstance(sent, torch.Tensor) else len(pickle.dumps(sent))
        result = original(*args, **kwargs)
        after = len(pickle.dumps(args[0])) if name == "broadcast_object_list" else 0
        self.largest = max(self.largest, size, after)
        return result


def _items(rank: int, count: int) -> list[Any]:
    """Distinct items of very different sizes; rank 1 has none."""
    if rank == 1:
        return []
    return [(rank, index, "x" * (index * index % 977)) for index in range(count + 7 * rank)]


def values_and_order(runtime: Runtime, count: int, chunk: int) -> dict[str, Any]:
    """Send the same items in chunks and in one object."""
    module.CHUNK_BYTES = chunk
    mine = _items(runtime.rank, count)
    chunked = runtime.gather_items(mine)
    whole = runtime.gather_objects(mine)
    spread = runtime.broadcast_items(chunked or ["of another rank"])
    return {"chunked": chunked, "whole": whole and [item for part in whole for item in part], "spread": spread}


def small_objects(runtime: Runtime) -> dict[str, Any]:
    """Run what sends small objects, and tell whether all went over the group for objects."""
    with Seen().watching() as seen:
        with failing_together():
            pass
        on_main(runtime, lambda: 1)
        shared = share_object(runtime.rank)
        gathered = runtime.gather_objects(runtime.rank)
        runtime.broadcast_items(runtime.gather_items([runtime.rank]) or [])
    group = objects_group()
    assert group is not None
    return {
        "calls": len(seen.groups),
        "own": all(each is group for each in seen.groups),
        "not the default": group is not dist.group.WORLD,
        "backend": dist.get_backend(group),
        "shared": shared,
        "gathered": gathered,
    }


def saved_tensors(runtime: Runtime, directory: Path) -> dict[str, set[str]]:
    """Save a tensor with megatron-core and torch, and name the collectives that they used."""
    state = planned_state([PlannedShard("w", (runtime.world_size,), (runtime.rank,), (4,), torch.float32)])
    with Seen().watching() as seen:
        writing = plan_writing(state, directory, lambda key, offset: torch.ones(1, 4))
        writing.write()
        writing.end(runtime)
    own = {name for name, group in zip(seen.names, seen.groups, strict=True) if group is objects_group()}
    return {"own": own, "default": set(seen.names) - own}


class _Engine:
    """An engine whose candidates are functions of the prompt."""

    def generate(self, prompts: Any, sampling: Any, *, seed: int, progress: Any) -> list[GeneratedGroup]:
        return [
            GeneratedGroup(
                prompt.id,
                tuple(GeneratedCandidate((*prompt.ids, k), True, -1.0) for k in range(sampling.candidates)),
            )
            for prompt in prompts
        ]


class _Source:
    def score(self, completions: Any) -> list[float]:
        return [float(len(completion.prompt) + len(completion.text)) for completion in completions]


class _Named:
    """Attributes given by name, in place of a policy, its topology and tokenizer."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def largest_message(runtime: Runtime, prompts: int, chunk: int) -> dict[str, Any]:
    """Gather the candidates and rewards of so many prompts, and broadcast them."""
    module.CHUNK_BYTES = chunk
    asked = [Prompt(f"p{i}", f"prompt {i}", tuple(range(i % 17 + 1))) for i in range(prompts)]
    topology = _Named(data_size=runtime.world_size, data_rank=runtime.rank, tensor_rank=0, is_first_stage=True)
    policy: Any = _Named(topology=topology, text_tokenizer=_Named(decode_completion=lambda ids: f"text {ids}"))
    sampling: Any = _Named(candidates=3)
    engine: Any = _Engine()
    with Seen().watching() as seen:
        drawn = generate.generate_records(engine, asked, sampling, policy, seed=0, runtime=runtime)
        everywhere = runtime.broadcast_items(drawn or [])
        scored = score_records(everywhere, _Source(), runtime, names=[], batch_size=8)
    return {
        "largest": seen.largest,
        "one record": max(len(pickle.dumps((0, record))) for record in everywhere),
        "all records": len(pickle.dumps(everywhere)),
        "everywhere": everywhere == _expected(asked),
        "scored": scored and [record.rewards for record in scored],
        "expected": [tuple(float(len(r.prompt) + len(c.text)) for c in r.candidates) for r in _expected(asked)],
    }


def _expected(asked: list[Prompt]) -> list[CandidateRecord]:
    return [
        CandidateRecord(
            prompt.id,
            prompt.text,
            prompt.ids,
            tuple(
                Candidate(text=f"text {(*prompt.ids, k)}", token_ids=(*prompt.ids, k), finished=True, logprob=-1.0)
                for k in range(3)
            ),
        )
        for prompt in asked
    ]
