"""A training step against an HF model with the straightforward EXO_rw loss.

Straightforward, after the paper's formulas: every candidate is a sequence of its own with the
prompt repeated, sequences are padded to the longest of their micro-batch (8 sequences, whole
groups), the model gives the logits of all positions, all are divided by tau, log_softmax runs over
all of them, and the values of the candidate tokens are gathered and summed. The reference runs the
same way without gradients. Both sides take one AdamW step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from exo_megatron.config.sections import ComputeConfig, LossConfig
from exo_megatron.data.groups import Group
from tools.bench.lengths import TLDR
from tools.bench.models import Matched, Shape, matched_models, random_groups, world
from tools.bench.options import Options
from tools.bench.table import Table
from tools.bench.training import OurSteps
from tools.bench.versus import NOTE, Versus

LOSS = LossConfig(kind="exo_rw", beta_pi=0.5, beta_r=1.0, temperature=0.8)
ROWS_PER_MICROBATCH = 8
SHAPE, QUICK_SHAPE = Shape(hidden=256, layers=4, vocab=32_000), Shape(hidden=64, layers=2, vocab=199, head_dim=16)
TARGETS = {8: {"live": 7.6, "stored": 10.0}}


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    shape, rows_per_step = (QUICK_SHAPE, 16) if options.quick else (SHAPE, 32)
    rows: list[tuple[str, ...]] = []
    with world() as runtime:
        for candidates in (4, 8):
            with matched_models(shape, runtime, ComputeConfig(precision="fp32")) as matched:
                groups = random_groups(TLDR.draw(rows_per_step // candidates, candidates), shape.vocab)
                ours, hf = OurSteps.of(matched, LOSS), StraightforwardLoss(matched)
                measured = Versus.measure(ours, hf, groups, options.rounds)
                rows += measured.rows(str(candidates), TARGETS.get(candidates, {}))
    return Table(
        f"Training step against an HF model with the straightforward EXO_rw loss, {TLDR.name} lengths",
        ("K", "reference", "ours, s", "HF / ours", "target", "gradient difference"),
        rows,
        (
            f"{shape}, fp32, {rows_per_step} candidates a step. Median (range) of ratios round by round.",
            NOTE,
        ),
    )


class StraightforwardLoss:
    """EXO_rw by transformers and autograd, without optimisations. See Peer."""

    def __init__(self, matched: Matched) -> None:
        self.model = copy.deepcopy(matched.hf).train()
        self.reference = copy.deepcopy(matched.hf).eval()

    def backward(self, groups: Sequence[Group]) -> None:
        """Run backward in micro-batches of whole groups. See Peer."""
        candidates = len(groups[0].candidates)
        size = max(1, ROWS_PER_MICROBATCH // candidates)
        for start in range(0, len(groups), size):
            (self._losses(groups[start : start + size]).sum() / len(groups)).backward()

    def _losses(self, groups: Sequence[Group]) -> Tensor:
        logps = sequence_logprobs(self.model, groups)
        if groups[0].reference_logprobs is None:
            with torch.no_grad():
                reference = sequence_logprobs(self.reference, groups)
        else:
            reference = logps.new_tensor([group.reference_logprobs for group in groups])
        log_p_theta = torch.log_softmax(LOSS.beta_pi * (logps - reference), dim=-1)  # Eq. 13
        log_p_r = torch.log_softmax(logps.new_tensor([group.rewards for group in groups]) / LOSS.beta_r, dim=-1)
        return (log_p_theta.exp() * (log_p_theta - log_p_r)).sum(dim=-1)  # Eq. 15


def sequence_logprobs(model: LlamaForCausalLM, groups: Sequence[Group]) -> Tensor:
    """Compute log pi(y_k | x) at temperature tau, [groups, K], from one padded sequence per
    candidate.
    """
    sequences = [([*group.prompt, *candidate], len(candidate)) for group in groups for candidate in group.candidates]
    longest = max(len(ids) for ids, _ in sequences)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in sequences], device=model.device)
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in sequences])
    of_candidate = torch.tensor([[0] * (len(ids) - r) + [1] * r + [0] * (longest - len(ids)) for ids, r in sequences])
    logits = model(input_ids=input_ids, attention_mask=attention_mask.to(model.device), use_cache=False).logits
    logps = torch.log_softmax(logits[:, :-1].float() / LOSS.temperature, dim=-1)
    picked = logps.gather(-1, input_ids[:, 1:, None])[..., 0]
    return (picked * of_candidate[:, 1:].to(model.device)).sum(dim=-1).view(len(groups), -1)
