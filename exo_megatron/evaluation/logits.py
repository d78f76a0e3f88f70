"""Outputs of a converted model at some topology and of the HF model at the same positions, in fp32.

A language model's outputs are logits, at the positions that predict a candidate's tokens and at its
last token. A reward model's are scores, at the last token of every candidate.
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

from exo_megatron.checkpoint.load import load_model
from exo_megatron.config.sections import ComputeConfig
from exo_megatron.execution.forward import forward_only, pipeline_forward
from exo_megatron.execution.policy import Policy
from exo_megatron.logprobs.logits import gathered_logits
from exo_megatron.models.layouts.groups import build_layout
from exo_megatron.models.spec import ModelSpec
from exo_megatron.parallel.ending import failing_together
from exo_megatron.parallel.runtime import Runtime
from exo_megatron.parallel.topology import Topology

T = TypeVar("T")

_SLACK = 2**30
"""Bytes for parts that the estimate of memory leaves out: activations, one tensor being copied."""

_LONGEST_WINDOW = 1024
"""Longest window for which a built-in example is made that exceeds it."""

_BEYOND = 48
"""Tokens by which that example exceeds the window. Most are a candidate's, which are compared."""


@dataclass(frozen=True)
class Example:
    """A prompt and its candidates as token ids, at least one each."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt with its longest candidate."""
        return len(self.prompt) + max(len(candidate) for candidate in self.candidates)


PackedExamples = Sequence[Sequence[Example]]
"""The examples of each micro-batch."""


@dataclass(frozen=True)
class Rounding:
    """Types to which weights are rounded before they are used in fp32; None for no rounding.

    If a conversion has narrowed the weights, the source model must compute with narrowed ones, too.
    """

    hf: torch.dtype | None = None
    ours: torch.dtype | None = None


@dataclass(frozen=True)
class Agreement:
    """The agreement of outputs over all compared positions.

    Attributes:
        positions: number of positions compared.
        difference: largest |difference|.
        largest: largest |output| of the HF model.
        worst: name of the position of the largest difference.
    """

    positions: int
    difference: float
    largest: float
    worst: str

    def within(self, tolerance: float) -> bool:
        """Tell whether |difference| <= tolerance * max(1, largest); False if one of them is NaN."""
        return self.difference <= tolerance * max(1.0, self.largest)


def longest_example(spec: ModelSpec) -> int:
    """Return the length of the longest prompt with a candidate, in tokens.

    One position is needed after the last token.
    """
    return spec.max_positions - 1


def built_in_examples(spec: ModelSpec) -> list[list[Example]]:
    """Build examples whose token ids are spread over the vocabulary.

    One micro-batch has groups of different lengths. If the model has windows, another one has a
    text that is longer than they are.
    """
    limit = min(64, longest_example(spec))

    def example(number: int, prompt: int, *candidates: int) -> Example:
        longest = max(1, limit - prompt)
        lengths = [max(1, min(length, longest)) for length in candidates]
        ids = [spread_ids(spec.vocab_size, length, 100 * number + k) for k, length in enumerate(lengths)]
        return Example(spread_ids(spec.vocab_size, prompt, 100 * number + 99), tuple(ids))

    examples = [[example(1, 1, limit), example(2, max(1, limit // 3), limit // 2, 1, limit // 4), example(3, 2, 3, 7)]]
    windows = [window for window in _windows(spec) if window <= _LONGEST_WINDOW]
    if windows:
        limit = min(max(windows) + _BEYOND, longest_example(spec))
        examples.append([example(4, max(1, limit - 40), 40, 5)])
    return examples


def windows_not_exceeded(spec: ModelSpec, examples: PackedExamples) -> list[int]:
    """List the windows that a text of the model may exceed but none of the examples does."""
    longest = max(example.longest for batch in examples for example in batch)
    return [window for window in _windows(spec) if longest <= window]


def _windows(spec: ModelSpec) -> list[int]:
    """List the windows that an example may exceed, in ascending order."""
    return sorted({window for window in spec.windows if window is not None and window < longest_example(spec)})


def spread_ids(vocab_size: int, count: int, seed: int) -> tuple[int, ...]:
    """Return `count` ids of a low-discrepancy sequence, which covers the vocabulary evenly."""
    golden = (math.sqrt(5) - 1) / 2
    return tuple(int(vocab_size * ((seed * 0.37 + (i + 1) * golden) % 1.0)) for i in range(count))


def memory_shortage(
    runtime: Runtime, topology: Topology, *, parameters: int, spec: ModelSpec, examples: PackedExamples
) -> str | None:
    """Estimate whether `compare_outputs` fits into memory. Collective over the world.

    The estimate counts the fp32 weights of the HF model on one rank, then those of ours on all
    ranks (on the GPU where there is one), and the outputs of both.

    Args:
        runtime: the processes of the world.
        topology: the topology of our model.
        parameters: number of parameters of the whole model.
        spec: the model.
        examples: the examples to be compared.

    Returns:
        The shortage in words, or None; the same on every rank.
    """
    embedding = spec.padded_vocab_size * spec.hidden_size
    ours = 4 * (parameters // (topology.tensor_size * topology.pipeline_size) + embedding)
    outputs = 12 * sum(_positions(batch) for batch in examples) * (spec.labels or spec.padded_vocab_size)
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
    hf: Path,
    checkpoint: Path,
    topology: Topology,
    spec: ModelSpec,
    examples: PackedExamples,
    rounding: Rounding,
    runtime: Runtime,
) -> Agreement | str:
    """Run both models on the examples. Collective over the world.

    The HF model runs on the CPU of one rank, with eager attention and each candidate with its
    prompt in a sequence of its own. It is dropped before ours is loaded.

    Args:
        hf: directory of the HF checkpoint.
        checkpoint: the distributed checkpoint.
        topology: the topology of our model.
        spec: the model.
        examples: the examples of each micro-batch.
        rounding: types to which the weights of either model are rounded first.
        runtime: the processes of the world.

    Returns:
        The agreement, or a string that says why transformers cannot load the HF model; the same on
        every rank.
    """
    with failing_together():
        theirs = _hf_outputs(hf, spec, examples, rounding.hf) if _reports(topology) else []
    refused = _told(runtime, theirs if isinstance(theirs, str) else None)
    if refused is not None:
        return refused
    assert not isinstance(theirs, str)
    compute = ComputeConfig(precision="fp32")
    policy = Policy(load_model(checkpoint, topology, compute), topology, compute)
    _round(policy.model, rounding.ours)
    with forward_only(policy.model):
        ours = [_batch_outputs(policy, batch) for batch in examples]
    agreement = None
    if _reports(topology):
        agreement = _agreement(theirs, [output.cpu() for output in ours if output is not None], examples, spec)
    found = _told(runtime, agreement)
    assert found is not None
    return found


def _told(runtime: Runtime, value: T | None) -> T | None:
    """Return the value of the one rank that has any, on every rank. Collective over the world."""
    gathered = runtime.gather_objects(value) or []
    return runtime.broadcast_object(next((each for each in gathered if each is not None), None))


def _reports(topology: Topology) -> bool:
    """Tell whether this is the rank that has whole outputs of our model and runs the HF model."""
    return topology.is_last_stage and topology.tensor_rank == 0 and topology.data_rank == 0


def _hf_outputs(
    directory: Path, spec: ModelSpec, examples: PackedExamples, rounded: torch.dtype | None
) -> list[Tensor] | str:
    """Compute the HF model's outputs of every micro-batch, in the order of the candidates.

    They are fp32, [N, V] for logits and [C, labels] for scores. The result is a string if
    transformers cannot load the model.
    """
    model = _load_hf(directory, scores=spec.labels is not None)
    if isinstance(model, str):
        return model
    _round(model, rounded)
    outputs = []
    with torch.no_grad():
        for batch in examples:
            parts = [
                _hf_candidate(model, example.prompt, candidate, scores=spec.labels is not None)
                for example in batch
                for candidate in example.candidates
            ]
            outputs.append(torch.cat(parts))
    return outputs


def _hf_candidate(model: Any, prompt: tuple[int, ...], candidate: tuple[int, ...], *, scores: bool) -> Tensor:
    ids = torch.tensor([[*prompt, *candidate]])
    if scores:
        return model(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]
    # With a vocabulary of 262144, the logits of a long prompt are larger than a small model.
    output: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(candidate) + 1).logits
    return output[0].float()


def _load_hf(directory: Path, *, scores: bool) -> Any:
    """Load the HF model on the CPU; return the reason as a string if transformers cannot."""
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
    # Without a padding id, the last token of the single sequence is scored, whatever its id.
    model.config.pad_token_id = None
    return model.eval()


def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _batch_outputs(policy: Policy, batch: Sequence[Example]) -> Tensor | None:
    """Compute our model's outputs of a micro-batch, as `_hf_outputs` does.

    They are on the last pipeline stage; the result is None on the others. For logits, one more
    token is appended to every candidate, so that its own last token predicts something, too.
    """
    spec, topology = policy.spec, policy.topology
    more = (0,) if spec.labels is None else ()
    layout = build_layout(
        [example.prompt for example in batch],
        [[(*candidate, *more) for candidate in example.candidates] for example in batch],
        multiple=topology.token_multiple,
    ).to(topology.device)
    output = pipeline_forward(policy, layout)
    if output is None or spec.labels is not None:
        return output
    natural = layout.token_predictor[torch.argsort(layout.token_order)]
    return gathered_logits(output[natural], policy.model.output_weight(), spec, topology)


def _agreement(
    theirs: Sequence[Tensor], ours: Sequence[Tensor], examples: PackedExamples, spec: ModelSpec
) -> Agreement:
    expected, actual = torch.cat(list(theirs)), torch.cat(list(ours))
    difference = (expected - actual).abs().amax(dim=1)
    worst = int(difference.nan_to_num(nan=math.inf).argmax())
    return Agreement(
        positions=expected.shape[0],
        difference=float(difference[worst]),
        largest=float(expected.abs().max()),
        worst=_places(examples, last_only=spec.labels is not None)[worst],
    )


def _places(examples: PackedExamples, *, last_only: bool) -> list[str]:
    """Name every compared position, in the order of the outputs."""
    places = []
    listed = [example for batch in examples for example in batch]
    for number, example in enumerate(listed, start=1):
        for k, candidate in enumerate(example.candidates, start=1):
            last = len(example.prompt) + len(candidate) - 1
            first = last if last_only else len(example.prompt) - 1
            places += [f"prompt {number}, candidate {k}, position {at}" for at in range(first, last + 1)]
    return places


def _positions(batch: Sequence[Example]) -> int:
    return sum(len(candidate) + 1 for example in batch for candidate in example.candidates)


@dataclass(frozen=True)
class _Needs:
    """Bytes that a rank needs and has.

    The HF model and the rest are counted apart, because the HF model is dropped first.
    """

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
