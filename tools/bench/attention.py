"""Attention over candidate groups, four ways, forward and backward.

- ours: the packed sequence in two passes that are merged by log-sum-exp;
- separate sequences: every candidate behind its own copy of the prompt, K causal sequences in one batch;
- dense mask: the packed sequence under a mask [S, S] of the keys that each query sees;
- FlexAttention: the packed sequence under a block mask, compiled; on CUDA only, because it has no
  backward on the CPU.

All but ours use torch's `scaled_dot_product_attention` or `flex_attention`. The sides get the same
queries, keys, values and gradient of the output; their gradients of all three are compared. For
separate sequences, the gradients of the copies of a prompt are summed, and each copy's output gets its
share of the gradient. Masks, layouts and repeated inputs are made beforehand, as a model makes them
once for all of its layers: they are not in the times, but in the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from exo_megatron.diagnosis.memory import peak_bytes
from exo_megatron.diagnosis.timing import Timings, alternate
from exo_megatron.models.attention.passes import ScoreRule
from exo_megatron.models.layouts.groups import GroupLayout, build_layout
from tools.bench.options import Options
from tools.bench.sides import Different, agree
from tools.bench.table import Table

HEADS, GROUPED_HEADS, HEAD_DIM = 8, 2, 64
OURS, SEPARATE, DENSE, FLEX = "ours", "separate sequences", "dense mask", "FlexAttention"
NO_FLEX = "no backward on CPU"
Triple = tuple[Tensor, ...]
"""Query, key and value, or their gradients."""


@dataclass(frozen=True)
class Case:
    """A packed sequence of equal groups, and the number of key/value heads."""

    prompt: int
    length: int
    candidates: int
    groups: int = 1
    key_heads: int = HEADS

    def layout(self, device: torch.device) -> GroupLayout:
        """Lay out the packed sequence; the token ids do not matter."""
        candidates = [[0] * self.length] * self.candidates
        return build_layout([[0] * self.prompt] * self.groups, [candidates] * self.groups).to(device)

    @property
    def num_tokens(self) -> int:
        """Number S of tokens of the packed sequence."""
        return self.groups * (self.prompt + self.candidates * self.length)

    def pairs(self, side: str) -> float:
        """Count the query-key pairs for which the side has to compute a score."""
        text = self.prompt + self.length
        if side == OURS:
            own = self.length * (self.prompt + self.length / 2)
            return self.groups * (self.prompt**2 / 2 + self.candidates * own)
        return self.groups * self.candidates * text**2 / 2 if side == SEPARATE else self.num_tokens**2

    def __str__(self) -> str:
        return f"{self.prompt}, {self.length}, {self.candidates}" + (f" x{self.groups}" if self.groups > 1 else "")


SHAPES = ((47, 230, 4, 1), (400, 50, 4, 1), (400, 50, 8, 1), (512, 512, 4, 1), (1024, 128, 8, 1), (400, 50, 4, 4))
CASES = [Case(*shape, key_heads) for shape in SHAPES for key_heads in (HEADS, GROUPED_HEADS)]
QUICK_CASES = [Case(12, 20, 4), Case(40, 5, 3, 2, GROUPED_HEADS)]


@dataclass(frozen=True)
class Side:
    """One way to attend.

    inputs: leaf tensors. attend: function of the inputs that returns the output. packed: function
    that turns an input's gradient into its form in the packed sequence.
    """

    inputs: Triple
    output_gradient: Tensor
    attend: Callable[..., Tensor]
    packed: Callable[[Tensor], Tensor]
    mask: Tensor | None = None

    def forward(self) -> Tensor:
        """Compute the output, and keep what the backward needs."""
        return self.attend(*self.inputs)

    def both(self) -> Triple:
        """Run forward and backward, and return the gradients of the inputs."""
        return torch.autograd.grad(self.forward(), self.inputs, self.output_gradient)

    def gradients(self) -> dict[str, Tensor]:
        """Compute the gradients of query, key and value of the packed sequence."""
        found = (self.packed(gradient) for gradient in self.both())
        return dict(zip(("query", "key", "value"), found, strict=True))

    def memory(self) -> int:
        """Measure the peak bytes of forward and backward, with inputs and mask."""
        held = [*self.inputs, self.output_gradient, *([] if self.mask is None else [self.mask])]
        return sum(tensor.nbytes for tensor in held) + peak_bytes(self.both)


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, tolerance = (torch.bfloat16, 2e-2) if device.type == "cuda" else (torch.float32, 1e-5)
    rows = []
    for case in QUICK_CASES if options.quick else CASES:
        sides = make_sides(case, device, dtype)
        difference = compare(sides, tolerance)
        forward = alternate({name: side.forward for name, side in sides.items()}, rounds=options.rounds)
        both = alternate({name: side.both for name, side in sides.items()}, rounds=options.rounds)
        memory = {name: side.memory() for name, side in sides.items()}
        rows.append(_cells(case, forward, both, memory, difference))
    return Table(
        "Attention over candidate groups, against ours in two passes",
        (
            "P, R, K",
            "heads q/kv",
            "ours forward, forward + backward, ms",
            "separate sequences",
            "by pairs",
            "dense mask",
            "by pairs",
            "FlexAttention",
            "memory: ours, MiB",
            "separate sequences",
            "dense mask",
            "gradient difference",
        ),
        rows,
        (
            f"{dtype}, heads of {HEAD_DIM}; x4: four groups in the micro-batch. Ratios are of times to ours: forward / "
            "forward and backward, medians. by pairs: the ratio of query-key pairs, what forward and backward would "
            "have if pairs were all that costs.",
            "memory: inputs, mask, output and gradients included; the others relative to ours.",
        ),
    )


def make_sides(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Side]:
    """Make all sides that this device supports, on the same random inputs."""
    layout, mask = case.layout(device), visible(case, device)
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (
        torch.randn(case.num_tokens, heads, HEAD_DIM, generator=generator).to(device, dtype)
        for heads in (HEADS, case.key_heads, case.key_heads, HEADS)
    )
    packed, rule = (query, key, value), ScoreRule(HEAD_DIM**-0.5)
    copies = separate_sequences(case, device)
    share = gradient.clone()
    share[layout.prompt_index] /= case.candidates  # as many copies of a prompt's output
    sides = {
        OURS: Side(_leaves(packed), gradient, partial(_ours, layout=layout, rule=rule), _same),
        SEPARATE: Side(
            _leaves(tuple(tensor[copies] for tensor in packed)),
            share[copies],
            partial(_fused, is_causal=True),
            partial(_summed, copies=copies, length=case.num_tokens),
        ),
        DENSE: Side(
            _leaves(tuple(tensor[None] for tensor in packed)),
            gradient[None],
            partial(_fused, attn_mask=mask),
            torch.squeeze,
            mask,
        ),
    }
    if device.type == "cuda":
        sides[FLEX] = flex_side(case, packed, gradient)
    return sides


def visible(case: Case, device: torch.device) -> Tensor:
    """Compute the mask [S, S] bool: a query sees the keys of its own prompt and its own
    candidate, up to itself.
    """
    group, segment = segments(case, device)
    mask = (group[:, None] == group) & ((segment[:, None] == segment) | (segment == 0))
    return mask.logical_and_(torch.ones_like(mask).tril_())


def segments(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return group and candidate of each token of the packed sequence, both [S].

    Candidates are counted from 1 over the whole sequence; prompts have 0.
    """
    lengths = [case.prompt, *[case.length] * case.candidates]
    groups = torch.arange(case.groups, device=device).repeat_interleave(sum(lengths))
    numbers = [[0, *range(g * case.candidates + 1, (g + 1) * case.candidates + 1)] for g in range(case.groups)]
    counts = torch.tensor(lengths * case.groups, device=device)
    return groups, torch.tensor(numbers, device=device).flatten().repeat_interleave(counts)


def separate_sequences(case: Case, device: torch.device) -> Tensor:
    """Return the token of the packed sequence for each token of the separate sequences, [groups * K,
    P + R].
    """
    start = torch.arange(case.groups, device=device)[:, None, None] * (case.prompt + case.candidates * case.length)
    prompt = torch.arange(case.prompt, device=device).expand(case.groups, case.candidates, -1)
    candidates = case.prompt + torch.arange(case.candidates * case.length, device=device)
    candidates = candidates.view(1, case.candidates, -1).expand(case.groups, -1, -1)
    return (start + torch.cat([prompt, candidates], -1)).flatten(0, 1)


def compare(sides: dict[str, Side], tolerance: float) -> float:
    """Return the largest difference of any side's gradients from ours.

    Raises Different, which names the side, if it exceeds the tolerance.
    """
    wanted, worst = sides[OURS].gradients(), 0.0
    for name, side in sides.items():
        if name == OURS:
            continue
        try:
            worst = max(worst, agree(wanted, side.gradients(), tolerance=tolerance))
        except Different as difference:
            raise Different(f"{name}: {difference}") from None
    return worst


def flex_side(case: Case, packed: Triple, gradient: Tensor) -> Side:
    """Make the side of FlexAttention under a block mask, compiled once per shape.

    It has not been run on CUDA so far, for want of a machine.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    group, segment = segments(case, gradient.device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = segment[query] == segment[key]
        return (query >= key) & (group[query] == group[key]) & (own | (segment[key] == 0))

    mask = create_block_mask(sees, None, None, case.num_tokens, case.num_tokens, device=gradient.device.type)
    torch._dynamo.reset()  # else from the ninth shape on flex_attention is no longer compiled
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = compiled(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask=mask,
            enable_gqa=case.key_heads != HEADS,
        )
        return output.transpose(1, 2)

    return Side(_leaves(tuple(tensor[None] for tensor in packed)), gradient[None], attend, torch.squeeze)


def _leaves(tensors: Triple) -> Triple:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def group_attention(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, rule: ScoreRule) -> Tensor:
    """Attend as a layer of the model does. [S, heads, d] -> [S, heads, d]."""
    return layout.attend(query, key, value, layer_number=1, rule=rule)


def _ours(query: Tensor, key: Tensor, value: Tensor, *, layout: GroupLayout, rule: ScoreRule) -> Tensor:
    return group_attention(query, key, value, layout, rule)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attend with torch's fused attention, on tensors [b, s, h, d] as a layer has them."""
    output = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _summed(gradient: Tensor, *, copies: Tensor, length: int) -> Tensor:
    """Compute the gradient of the packed sequence from that of its copies [b, P + R, h, d]."""
    packed = gradient.new_zeros(length, *gradient.shape[2:], dtype=torch.float32)
    return packed.index_add_(0, copies.flatten(), gradient.flatten(0, 1).float())


def _cells(case: Case, forward: Timings, both: Timings, memory: dict[str, int], difference: float) -> tuple[str, ...]:
    def times(side: str) -> str:
        return f"{forward.ratio(side, OURS):.2f} / {both.ratio(side, OURS):.2f}" if side in memory else NO_FLEX

    def pairs(side: str) -> str:
        return f"{case.pairs(side) / case.pairs(OURS):.2f}"

    return (
        str(case),
        f"{HEADS}/{case.key_heads}",
        f"{1e3 * forward.median(OURS):.1f}, {1e3 * both.median(OURS):.1f}",
        times(SEPARATE),
        pairs(SEPARATE),
        times(DENSE),
        pairs(DENSE),
        times(FLEX),
        f"{memory[OURS] / 2**20:.1f}",
        *(f"{memory[side] / memory[OURS]:.2f}" for side in (SEPARATE, DENSE)),
        f"{difference:.1e}",
    )
