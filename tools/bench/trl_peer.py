"""TRL's `DPOTrainer(loss_type="exo_pair")` on preference pairs.

With TRL's own collator and `training_step`, without gradient checkpointing. Its padding-free mode
is not among the settings: TRL 1.16 has switched it off ("temporarily unavailable"). One pair a
batch pads only the shorter of two.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from exo_megatron.config.sections import LossConfig
from exo_megatron.data.groups import Group
from tools.bench.models import Matched
from tools.bench.peer import Batching
from tools.bench.training import LEARNING_RATE
from tools.bench.work import chunks

SETTINGS = (Batching(1), Batching(2), Batching(4), Batching(8), Batching(4, by_length=True))


class TrlTrainer:
    """TRL's trainer on the same weights and pairs. See Peer. A batch is so many pairs."""

    name = "TRL"
    unit = "pair"
    settings = SETTINGS

    def __init__(self, matched: Matched, loss: LossConfig) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        self._place = tempfile.TemporaryDirectory(prefix="exo-bench-trl-")
        config = DPOConfig(
            output_dir=self._place.name,
            loss_type="exo_pair",
            beta=loss.beta_pi,
            label_smoothing=loss.label_smoothing,
            learning_rate=LEARNING_RATE,
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

    def units(self, groups: Sequence[Group]) -> int:
        """See Peer."""
        return len(groups)

    def backward(self, groups: Sequence[Group], batching: Batching) -> None:
        """See Peer."""
        self.trainer.precompute_ref_logps = groups[0].reference_logprobs is not None
        parts = _parts(groups, batching)
        self.trainer.current_gradient_accumulation_steps = len(parts)
        for part in parts:
            examples = [_example(group) for group in part]
            self.trainer.training_step(self.model, self.trainer._prepare_inputs(self.trainer.data_collator(examples)))

    def batches(self, groups: Sequence[Group], batching: Batching) -> list[list[int]]:
        """See Peer."""
        return [
            [len(group.prompt) + len(candidate) for group in part for candidate in group.candidates]
            for part in _parts(groups, batching)
        ]


def _parts(groups: Sequence[Group], batching: Batching) -> list[list[Group]]:
    """Split into batches. The number of pairs must be a multiple of their size, for TRL gives every
    batch the same weight.
    """
    in_order = sorted(groups, key=lambda group: -group.num_tokens) if batching.by_length else list(groups)
    return chunks(in_order, batching.size)


def _example(group: Group) -> dict[str, Any]:
    """Return a pair in the form that TRL's collator accepts."""
    chosen, rejected = group.candidates
    example: dict[str, Any] = {"prompt_ids": [*group.prompt], "chosen_ids": [*chosen], "rejected_ids": [*rejected]}
    if group.reference_logprobs is not None:
        example["ref_chosen_logps"], example["ref_rejected_logps"] = group.reference_logprobs
    return example
