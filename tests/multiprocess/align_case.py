"""What the parity and resume tests of `align` have in common: tiny checkpoints, data files, and topologies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests.reference.objective import LossKind, Objective, ReferenceGroup
from tests.reference.tiny_llama import EOS_ID, FIRST_WORD_ID, VOCAB_SIZE, text

# prompt length and candidate lengths, the end-of-sequence token included: K from 2 to 5.
SHAPES = [
    (5, (4, 9)),
    (1, (2, 3, 2)),
    (12, (6, 6, 1, 8)),
    (3, (15, 2, 5, 3, 4)),
    (7, (3, 11)),
    (9, (2, 2, 7, 2)),
    (2, (8, 13, 5)),
    (4, (3, 4)),
    (6, (10, 1, 2, 9, 3)),
]
MAX_TOKENS = 60  # the largest group has 33; micro-batches hold one to three groups
FEWEST_TOKENS = 20  # the longest prompt with one candidate; five of nine groups have more tokens
STEPS = 3
SEED = 1  # of the order of groups; see test_align_parity.py::test_packing_is_as_the_issue_asks


@dataclass(frozen=True)
class Case:
    """One run of `align`, or of `sft`."""

    tensor: int
    pipeline: int
    data: int
    kind: LossKind | Literal["sft"] = "exo_rw"
    tied: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    reference: Literal["stored", "live"] = "stored"
    sequence: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    groups_per_step: int = 5  # of 9: steps of 5, 4, 5
    max_tokens: int = MAX_TOKENS
    nll_weight: float = 0.0

    @property
    def world_size(self) -> int:
        """Processes that the case needs."""
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        """Unique, readable, usable as a directory name."""
        parts = [f"tp{self.tensor}pp{self.pipeline}dp{self.data}", self.kind, "tied" if self.tied else "untied"]
        parts += [f"recompute-{self.recompute}", self.reference, "sp" if self.sequence else "nosp", self.precision]
        parts += [f"decay{self.weight_decay}"] if self.weight_decay else []
        parts += [f"clip{self.clip_grad}"] if self.clip_grad != 1.0 else []
        parts += [f"groups{self.groups_per_step}"] if self.groups_per_step != 5 else []
        parts += [f"tokens{self.max_tokens}"] if self.max_tokens != MAX_TOKENS else []
        parts += [f"nll{self.nll_weight}"] if self.nll_weight else []
        return "_".join(parts)


CASES = [
    Case(1, 1, 1),
    Case(1, 1, 1, tied=True, recompute="full", reference="live"),
    Case(2, 1, 1, recompute="selective"),
    Case(2, 1, 1, tied=True, sequence=False, reference="live"),
    Case(1, 2, 1, recompute="full", reference="live"),
    Case(1, 2, 1, tied=True),
    Case(1, 1, 2),
    Case(1, 1, 2, clip_grad=0.0, groups_per_step=1),  # one rank has nothing to do
    Case(2, 2, 1),
    Case(2, 2, 1, tied=True, recompute="full"),
    Case(2, 1, 2),
    Case(2, 1, 2, reference="live", weight_decay=0.1),
    Case(2, 1, 2, "exo_pref", recompute="selective"),
    Case(2, 1, 2, "dpo_rw"),
    Case(2, 1, 2, "dpo_pref", tied=True),
    Case(1, 1, 1, "ipo_pref"),
    Case(2, 1, 1, "ipo_pref", recompute="full"),
    Case(1, 2, 1, "ipo_pref", tied=True),
    Case(2, 1, 2, "ipo_pref", reference="live"),
    Case(1, 2, 2, "ipo_pref", nll_weight=0.5),
    Case(1, 1, 1, nll_weight=0.5),
    Case(2, 1, 1, sequence=False, nll_weight=0.5),
    Case(2, 2, 1, tied=True, nll_weight=0.5),
    Case(2, 1, 2, nll_weight=0.5),
    Case(1, 1, 2, groups_per_step=1, nll_weight=0.5),  # one rank has nothing to do
    Case(1, 2, 2, "dpo_pref", nll_weight=0.5),
    Case(1, 2, 2, recompute="selective"),
    Case(1, 2, 2, tied=True, reference="live"),
    Case(1, 2, 2, groups_per_step=1),
    Case(2, 1, 2, "sft"),
    Case(1, 2, 2, "sft", tied=True),
    Case(2, 2, 1, "sft", recompute="selective"),
]
OVERSIZED = [
    Case(1, 1, 1, max_tokens=FEWEST_TOKENS),
    Case(1, 1, 1, tied=True, recompute="full", reference="live", max_tokens=FEWEST_TOKENS),
    Case(2, 1, 1, recompute="selective", max_tokens=FEWEST_TOKENS),
    Case(2, 1, 1, tied=True, sequence=False, reference="live", max_tokens=FEWEST_TOKENS),
    Case(1, 2, 1, recompute="full", reference="live", max_tokens=FEWEST_TOKENS),
    Case(1, 2, 1, tied=True, max_tokens=25),
    Case(1, 1, 2, max_tokens=FEWEST_TOKENS),
    Case(1, 1, 2, clip_grad=0.0, groups_per_step=1, max_tokens=FEWEST_TOKENS),  # a round of one group, or none
    Case(2, 2, 1, max_tokens=FEWEST_TOKENS),
    Case(2, 2, 1, tied=True, recompute="full", max_tokens=FEWEST_TOKENS),
    Case(2, 1, 2, reference="live", weight_decay=0.1, max_tokens=FEWEST_TOKENS),
    Case(2, 1, 2, "exo_pref", recompute="selective", max_tokens=FEWEST_TOKENS),
    Case(2, 1, 2, "dpo_rw", max_tokens=FEWEST_TOKENS),
    Case(2, 1, 2, "ipo_pref", reference="live", max_tokens=FEWEST_TOKENS),
    Case(1, 2, 2, "ipo_pref", max_tokens=FEWEST_TOKENS, nll_weight=0.5),
    Case(1, 1, 1, max_tokens=FEWEST_TOKENS, nll_weight=0.5),
    Case(2, 1, 1, sequence=False, max_tokens=FEWEST_TOKENS, nll_weight=0.5),
    Case(2, 2, 1, tied=True, max_tokens=FEWEST_TOKENS, nll_weight=0.5),
    Case(2, 1, 2, max_tokens=FEWEST_TOKENS, nll_weight=0.5),
    Case(1, 1, 2, groups_per_step=1, max_tokens=FEWEST_TOKENS, nll_weight=0.5),
    Case(1, 2, 2, recompute="selective", max_tokens=FEWEST_TOKENS),
    Case(1, 2, 2, tied=True, reference="live", max_tokens=FEWEST_TOKENS),
    Case(1, 2, 2, groups_per_step=1, max_tokens=FEWEST_TOKENS),
]
CASES += OVERSIZED
ROUGH_CASES = [Case(2, 1, 2, precision="bf16"), Case(1, 2, 2, tied=True, recompute="full", precision="bf16")]
EXPORTED = [Case(2, 2, 1), Case(1, 2, 1, tied=True)]


def objective(kind: LossKind, nll_weight: float = 0.0) -> Objective:
    """Constants that keep p_theta and p_r away from 0 and 1, so that every term of the loss counts."""
    return Objective(kind, beta_pi=0.3, beta_r=0.7, label_smoothing=0.1, temperature=0.8, nll_weight=nll_weight)


def reward_groups(*, seed: int = 0) -> list[ReferenceGroup]:
    """Groups of the shapes above with random words, each candidate ended by EOS, and normal rewards."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(FIRST_WORD_ID, VOCAB_SIZE, (count,), generator=generator).tolist())

    groups = []
    for prompt, lengths in SHAPES:
        candidates = tuple((*words(length - 1), EOS_ID) for length in lengths)
        # A candidate of EOS alone would be an empty completion, which is refused: it gets a word.
        candidates = tuple(y if len(y) > 1 else (*words(1), EOS_ID) for y in candidates)
        rewards = tuple(round(r, 3) for r in torch.randn(len(lengths), generator=generator).tolist())
        groups.append(ReferenceGroup(words(prompt), candidates, rewards))
    return groups


def preference_groups(*, seed: int = 1) -> list[ReferenceGroup]:
    """The first two candidates of every group; the first is the chosen one. No rewards."""
    return [ReferenceGroup(g.prompt, g.candidates[:2], (0.0, 0.0)) for g in reward_groups(seed=seed)]


def demonstrations(*, seed: int = 2) -> list[ReferenceGroup]:
    """The first candidate of every group. No rewards."""
    return [ReferenceGroup(g.prompt, g.candidates[:1], (0.0,)) for g in reward_groups(seed=seed)]


def write_records(path: Path, groups: list[ReferenceGroup], *, fields: Literal["rewards", "pair", "chosen"]) -> Path:
    """JSONL in the formats that users have: {prompt, completions, rewards}, {prompt, chosen, rejected}, or
    {prompt, chosen}.
    """
    with path.open("w", encoding="utf-8") as file:
        for group in groups:
            completions = [text(candidate[:-1]) for candidate in group.candidates]  # EOS is added at ingestion
            record: dict[str, Any] = {"prompt": text(group.prompt)}
            if fields == "rewards":
                record |= {"completions": completions, "rewards": list(group.rewards)}
            elif fields == "pair":
                record |= {"chosen": completions[0], "rejected": completions[1]}
            else:
                record |= {"chosen": completions[0]}
            file.write(json.dumps(record) + "\n")
    return path
