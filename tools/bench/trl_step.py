"""A training step against TRL's `DPOTrainer(loss_type="exo_pair")` on preference pairs.

Both sides start from the same weights and take the same pairs through one optimizer step: TRL with
its own collator, `training_step` and AdamW, in micro-batches of 8 pairs (the default of its
Trainer), without gradient checkpointing and in fp32; ours with packing included. The reference is
live (its forward pass is part of the step) or its log-probs are given.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from exo_megatron.config.sections import ComputeConfig, LossConfig
from exo_megatron.data.groups import Group
from tools.bench.lengths import HH, TLDR
from tools.bench.models import Matched, Shape, matched_models, random_groups, world
from tools.bench.options import Options
from tools.bench.table import Table
from tools.bench.training import LEARNING_RATE, OurSteps
from tools.bench.versus import NOTE, Versus

LOSS = LossConfig(kind="exo_pref", beta_pi=0.1, label_smoothing=1e-3, temperature=1.0)  # TRL has no temperature
PAIRS_PER_MICROBATCH = 8
SHAPE, QUICK_SHAPE = Shape(hidden=256, layers=4, vocab=32_000), Shape(hidden=64, layers=2, vocab=199, head_dim=16)
TARGETS = {HH.name: {"live": 6.0, "stored": 7.8}, TLDR.name: {"live": 4.4, "stored": 5.8}}


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    shape, pairs = (QUICK_SHAPE, 4) if options.quick else (SHAPE, 4 * PAIRS_PER_MICROBATCH)
    rows: list[tuple[str, ...]] = []
    with world() as runtime:
        for lengths in (HH, TLDR):
            with matched_models(shape, runtime, ComputeConfig(precision="fp32")) as matched:
                groups = random_groups(lengths.draw(pairs, 2), shape.vocab)
                measured = Versus.measure(OurSteps.of(matched, LOSS), TrlTrainer(matched), groups, options.rounds)
                rows += measured.rows(lengths.name, TARGETS[lengths.name])
    return Table(
        "Training step against TRL's exo_pair, K=2",
        ("lengths", "reference", "ours, s", "TRL / ours", "target", "gradient difference"),
        rows,
        (
            f"{shape}, fp32, {pairs} pairs a step. Median (range) of ratios round by round.",
            NOTE,
        ),
    )


class TrlTrainer:
    """TRL's trainer on the same weights and pairs. See Peer."""

    def __init__(self, matched: Matched) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        self._place = tempfile.TemporaryDirectory(prefix="exo-bench-trl-")
        config = DPOConfig(
            output_dir=self._place.name,
            loss_type="exo_pair",
            beta=LOSS.beta_pi,
            label_smoothing=LOSS.label_smoothing,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=PAIRS_PER_MICROBATCH,
            gradient_checkpointing=False,
            bf16=False,
            max_length=None,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        pair = {"prompt": "w3 w4", "chosen": " w5 </s>", "rejected": " w6 </s>"}  # batches are made from ids below
        self.trainer: Any = DPOTrainer(
            model=copy.deepcopy(matched.hf),
            ref_model=copy.deepcopy(matched.hf),
            args=config,
            train_dataset=Dataset.from_list([pair]),
            processing_class=matched.tokenizer,
        )
        self.model = self.trainer.model
        self.model.train()

    def backward(self, groups: Sequence[Group]) -> None:
        """Run TRL's own micro-batches, each with its own loss. See Peer."""
        self.trainer.precompute_ref_logps = groups[0].reference_logprobs is not None
        starts = range(0, len(groups), PAIRS_PER_MICROBATCH)
        self.trainer.current_gradient_accumulation_steps = len(starts)
        for start in starts:
            examples = [_example(group) for group in groups[start : start + PAIRS_PER_MICROBATCH]]
            self.trainer.training_step(self.model, self.trainer._prepare_inputs(self.trainer.data_collator(examples)))


def _example(group: Group) -> dict[str, Any]:
    """Return a pair in the form that TRL's collator accepts."""
    chosen, rejected = group.candidates
    example: dict[str, Any] = {"prompt_ids": [*group.prompt], "chosen_ids": [*chosen], "rejected_ids": [*rejected]}
    if group.reference_logprobs is not None:
        example["ref_chosen_logps"], example["ref_rejected_logps"] = group.reference_logprobs
    return example
