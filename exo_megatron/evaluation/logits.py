"""Outputs of a converted model at some topology, and those of the HF model at the same positions, in fp32.

A language model's outputs are logits, taken where a candidate's tokens are predicted and at its last token; a reward
model's are scores, taken at the last token of every candidate.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from exo_megatron.checkpoint.collective import together
from exo_megatron.checkpoint.policy import load_checkpoint
from exo_megatron.config.sections import ComputeConfig
from exo_megatron.logprobs.logits import gathered_logits
from exo_megatron.models.layout import build_layout
from exo_megatron.models.policy import PolicyModel
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology
from exo_megatron.rollout.pipeline import forward_only, run_stage

T = TypeVar("T")

_SLACK = 2**30
"""Bytes for what the estimate of memory leaves out: activations, one tensor on its way."""

_LONGEST_WINDOW = 1024
"""A window up to this length is exceeded by a row of the built-in examples."""

_BEYOND = 48
"""By how many tokens, of which most are a candidate's: where outputs are compared, and no further back."""


@dataclass(frozen=True)
class Example:
    """A prompt and its candidates, token ids, at least one each."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest candidate."""
        return len(self.prompt) + max(len(candidate) for candidate in self.candidates)


Rows = Sequence[Sequence[Example]]
"""What is packed into each row."""


@dataclass(frozen=True)
class Rounding:
    """Types to which weights are rounded before they are used in fp32; None: as they are.

    Where a conversion has narrowed the weights, the other model must compute with the narrowed ones, too.
    """

    hf: torch.dtype | None = None
    ours: torch.dtype | None = None


@dataclass(frozen=True)
class Agreement:
    """How far outputs agree: positions compared, the largest |difference| and where, the largest |output| of HF."""

    positions: int
    difference: float
    largest: float
    worst: str

    def within(self, tolerance: float) -> bool:
        """Whether |difference| <= tolerance * max(1, largest); never where one of them is not a number."""
        return self.difference <= tolerance * max(1.0, self.largest)


def longest_example(spec: ModelSpec) -> int:
    """Tokens that a prompt with a candidate may have; one position is needed after the last token."""
    return spec.max_positions - 1


def built_in_examples(spec: ModelSpec) -> list[list[Example]]:
    """Ids spread over the whole vocabulary, ragged groups in one row, and a row longer than the model's windows."""
    limit = min(64, longest_example(spec))

    def example(number: int, prompt: int, *candidates: int) -> Example:
        room = max(1, limit - prompt)
        lengths = [max(1, min(length, room)) for length in candidates]
        ids = [spread_ids(spec.vocab_size, length, 100 * number + k) for k, length in enumerate(lengths)]
        return Example(spread_ids(spec.vocab_size, prompt, 100 * number + 99), tuple(ids))

    rows = [[example(1, 1, limit), example(2, max(1, limit // 3), limit // 2, 1, limit // 4), example(3, 2, 3, 7)]]
    windows = [window for window in _windows(spec) if window <= _LONGEST_WINDOW]
    if windows:
        limit = min(max(windows) + _BEYOND, longest_example(spec))
        rows.append([example(4, max(1, limit - 40), 40, 5)])
    return rows


def windows_not_exceeded(spec: ModelSpec, rows: Rows) -> list[int]:
    """Windows that a text of the model may exceed, and none of the rows does."""
    longest = max(example.longest for row in rows for example in row)
    return [window for window in _windows(spec) if longest <= window]


def _windows(spec: ModelSpec) -> list[int]:
    """The windows that an example may exceed, ascending."""
    return sorted({window for window in spec.windows if window is not None and window < longest_example(spec)})


def spread_ids(vocab_size: int, count: int, seed: int) -> tuple[int, ...]:
    """Ids of a low-discrepancy sequence over the vocabulary: few of them reach all of its parts."""
    golden = (math.sqrt(5) - 1) / 2
    return tuple(int(vocab_size * ((seed * 0.37 + (i + 1) * golden) % 1.0)) for i in range(count))


def memory_shortage(
    runtime: Runtime, topology: Topology, *, parameters: int, spec: ModelSpec, rows: Rows
) -> str | None:
    """Why `compare_outputs` would not fit into memory, or None. Collective over the world.

    An estimate: fp32 weights of the HF model on one rank, then those of ours on all ranks (on the GPU where there is
    one), and the outputs of both.
    """
    embedding = spec.padded_vocab_size * spec.hidden_size
    ours = 4 * (parameters // (topology.tensor_size * topology.pipeline_size) + embedding)
    outputs = 12 * sum(_positions(row) for row in rows) * (spec.labels or spec.padded_vocab_size)
    on_gpu = topology.device.type == "cuda"
    needs = _Needs(
        host=socket.gethostname(),
        available=psutil.virtual_memory().available,
        hf=4 * parameters if _reports(topology) else 0,
        ours=outputs if on_gpu else ours + outputs,
        gpu=ours + outputs + _SLACK if on_gpu else 0,
        gpu_available=torch.cuda.mem_get_info(topology.device)[0] if on_gpu else 0,
    )
    return runtime.broadcast_object(_shortage(runtime.gather_objects(needs) or []))


def compare_outputs(
    hf: Path, checkpoint: Path, topology: Topology, spec: ModelSpec, rows: Rows, rounding: Rounding, runtime: Runtime
) -> Agreement | str:
    """Run both models on the rows; a string says why transformers cannot load HF's. Collective over the world.

    The HF model runs on the CPU of one rank, eager attention, each candidate with its prompt in a sequence of its
    own, and is gone before ours is loaded. The same on every rank.
    """
    theirs = together(lambda: _hf_outputs(hf, spec, rows, rounding.hf) if _reports(topology) else [])
    refused = _told(runtime, theirs if isinstance(theirs, str) else None)
    if refused is not None:
        return refused
    assert not isinstance(theirs, str)
    model, _ = load_checkpoint(checkpoint, topology, ComputeConfig(precision="fp32"))
    _round(model, rounding.ours)
    with forward_only(model):
        ours = [_row_outputs(model, spec, topology, row) for row in rows]
    agreement = None
    if _reports(topology):
        agreement = _agreement(theirs, [output.cpu() for output in ours if output is not None], rows, spec)
    found = _told(runtime, agreement)
    assert found is not None
    return found


def _told(runtime: Runtime, value: T | None) -> T | None:
    """The value of the one rank that has any, on every rank. Collective over the world."""
    gathered = runtime.gather_objects(value) or []
    return runtime.broadcast_object(next((each for each in gathered if each is not None), None))


def _reports(topology: Topology) -> bool:
    """The one rank that has whole outputs of ours and runs the HF model."""
    return topology.is_last_stage and topology.tensor_rank == 0 and topology.data_rank == 0


def _hf_outputs(directory: Path, spec: ModelSpec, rows: Rows, rounded: torch.dtype | None) -> list[Tensor] | str:
    """[N, V] or [C, labels] fp32 of every row, candidate after candidate; or why there is no model."""
    model = _load_hf(directory, scores=spec.labels is not None)
    if isinstance(model, str):
        return model
    _round(model, rounded)
    outputs = []
    with torch.no_grad():
        for row in rows:
            parts = [
                _hf_candidate(model, example.prompt, candidate, scores=spec.labels is not None)
                for example in row
                for candidate in example.candidates
            ]
            outputs.append(torch.cat(parts))
    return outputs


def _hf_candidate(model: Any, prompt: tuple[int, ...], candidate: tuple[int, ...], *, scores: bool) -> Tensor:
    ids = torch.tensor([[*prompt, *candidate]])
    if scores:
        return model(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]
    # At a vocabulary of 262144, the logits of a long prompt are larger than a small model.
    output: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(candidate) + 1).logits
    return output[0].float()


def _load_hf(directory: Path, *, scores: bool) -> Any:
    """The model, or why transformers cannot load it."""
    import transformers

    kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = kind.from_pretrained(
            str(directory),
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    # transformers raises many unrelated types for models that it cannot use.
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"transformers {transformers.__version__} cannot load the HF checkpoint ({why})"
    # The last token of a lone sequence is scored, whatever its id.
    model.config.pad_token_id = None
    return model.eval()


def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _row_outputs(model: PolicyModel, spec: ModelSpec, topology: Topology, row: Sequence[Example]) -> Tensor | None:
    """What `_hf_outputs` has of a row, on the last stage; None on the others.

    For logits every candidate is followed by one more token, so that its own last token predicts something, too.
    """
    more = (0,) if spec.labels is None else ()
    layout = build_layout(
        [example.prompt for example in row],
        [[(*candidate, *more) for candidate in example.candidates] for example in row],
        multiple=topology.row_multiple,
    ).to(topology.device)
    output = run_stage(model, layout, topology)
    if output is None or spec.labels is not None:
        return output
    natural = layout.token_row[torch.argsort(layout.token_order)]
    return gathered_logits(output[natural], model.output_weight(), spec, topology)


def _agreement(theirs: Sequence[Tensor], ours: Sequence[Tensor], rows: Rows, spec: ModelSpec) -> Agreement:
    expected, seen = torch.cat(list(theirs)), torch.cat(list(ours))
    difference = (expected - seen).abs().amax(dim=1)
    worst = int(difference.nan_to_num(nan=math.inf).argmax())
    return Agreement(
        positions=expected.shape[0],
        difference=float(difference[worst]),
        largest=float(expected.abs().max()),
        worst=_places(rows, last_only=spec.labels is not None)[worst],
    )


def _places(rows: Rows, *, last_only: bool) -> list[str]:
    """What to call each compared position."""
    places = []
    examples = [example for row in rows for example in row]
    for number, example in enumerate(examples, start=1):
        for k, candidate in enumerate(example.candidates, start=1):
            last = len(example.prompt) + len(candidate) - 1
            first = last if last_only else len(example.prompt) - 1
            places += [f"prompt {number}, candidate {k}, position {at}" for at in range(first, last + 1)]
    return places


def _positions(row: Sequence[Example]) -> int:
    return sum(len(candidate) + 1 for example in row for candidate in example.candidates)


@dataclass(frozen=True)
class _Needs:
    """Bytes that a rank needs and has: for the HF model, which is gone before ours is loaded, and for the rest."""

    host: str
    available: int
    hf: int
    ours: int
    gpu: int
    gpu_available: int


def _shortage(ranks: Sequence[_Needs]) -> str | None:
    for rank, needs in enumerate(ranks):
        here = [other for other in ranks if other.host == needs.host]
        needed = max(sum(other.hf for other in here), sum(other.ours for other in here)) + _SLACK
        if needed > needs.available:
            return f"{needs.host} has {_gib(needs.available)} of memory free, about {_gib(needed)} are needed"
        if needs.gpu > needs.gpu_available:
            return f"the GPU of rank {rank} has {_gib(needs.gpu_available)} free, about {_gib(needs.gpu)} are needed"
    return None


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
