"""Rollout against HF's `generate(num_return_sequences=K)` and against the floor of our own products.

Both sides draw K candidates of R tokens for the same prompts of P tokens, at temperature 1 from the
whole vocabulary, with the same weights. Nothing ends earlier: our end of sequence is a token that
the model lacks, and HF is given none. HF runs at the best of several numbers of prompts in a batch,
found by one timing of each, and with equal lengths has neither padding nor lines that wait.

Before times are taken, the log-probs that our side reports are compared with those of HF's forward
pass for the same tokens, and the tokens that went through the layers with those that the scheduler
planned.

The floor is a pass's own matrix products plus one read of the weights and of the distinct cache, as
tools/bench/rollout_floor.py defines them: what decoding would take if nothing else counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from exo_megatron.config.sections import ComputeConfig, SamplingConfig
from exo_megatron.data.prompts import Prompt
from exo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from exo_megatron.diagnosis.timing import Clock, Timings, alternate, choose_clock, timed
from exo_megatron.diagnosis.work import Lengths
from exo_megatron.execution.policy import Policy
from exo_megatron.rollout.engine import GeneratedGroup
from exo_megatron.rollout.native import NativeEngine
from tools.bench.counting import counted_passes
from tools.bench.models import Shape, matched_models, random_groups, words, world
from tools.bench.options import Options
from tools.bench.rollout_floor import Floor, PlannedPass, planned_passes
from tools.bench.sides import Different, agree
from tools.bench.table import Record, Table

CASES = ((400, 50, 8, 32), (47, 128, 4, 64), (400, 50, 8, 4), (47, 128, 4, 4))
"""P, R, K and the number of prompts: enough to fill the active set, and few, where the time of the
host counts."""
QUICK_CASES = ((12, 6, 4, 6), (5, 9, 2, 8))
SHAPE, QUICK_SHAPE = Shape(hidden=512, layers=6, vocab=2048), Shape(hidden=64, layers=2, vocab=199, head_dim=16)
HF_BATCHES = (1, 4, 8, 16)
"""Prompts in a batch of HF; the last one's are what each is tried on."""
COMPARED = 4
"""Prompts whose log-probs HF computes."""
TOLERANCE = 1e-5
TARGET = 1.4
SEED = 7


def run(options: Options) -> Table:
    """Run the benchmark. See the module."""
    shape = QUICK_SHAPE if options.quick else SHAPE
    lines: list[tuple[str, ...]] = []
    records: list[Record] = []
    clock = choose_clock(quick=options.quick)
    with world() as runtime, matched_models(shape, runtime, ComputeConfig(precision="fp32")) as matched:
        policy = replace(matched.load(), tokenizer=endless_tokenizer(shape.vocab))
        for case in QUICK_CASES if options.quick else CASES:
            line, record = _measured(Sides(policy, matched.hf, *case), options.rounds, clock)
            ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in record.ratios.items())
            print(f"{record.case}: {ratios}", flush=True)
            lines.append(line)
            records.append(record)
    return Table(
        "Rollout against HF generate and against the floor of our own matrix products",
        (
            "P, R, K",
            "prompts",
            "ours, s",
            "floor, s",
            "products alone, s",
            "ours / floor",
            "target",
            "HF's best batch",
            "HF / ours",
            "log-prob difference",
        ),
        lines,
        (
            f"{shape}, fp32. Median (range) of ratios round by round; ours / floor: less is better.",
            "floor: the products of every pass, plus one read of the weights and of the distinct cache.",
        ),
        records,
    )


def endless_tokenizer(vocab: int) -> Tokenizer:
    """Make a tokenizer whose end of sequence is a token that a model of `vocab` tokens lacks."""
    tokenizer = words(vocab)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with tempfile.TemporaryDirectory(prefix="exo-bench-") as place:
        tokenizer.save_pretrained(place)
        return load_tokenizer(Path(place))


class Sides:
    """Both sides on the same prompts."""

    def __init__(
        self, policy: Policy, hf: LlamaForCausalLM, prompt: int, length: int, candidates: int, prompts: int
    ) -> None:
        self.policy = policy
        self.hf = hf.eval()
        self.name = f"{prompt}, {length}, {candidates}"
        groups = random_groups([Lengths(prompt, ())] * prompts, policy.spec.vocab_size)
        self.prompts = [Prompt(id=group.id, text="", ids=group.prompt) for group in groups]
        self.sampling = SamplingConfig(candidates=candidates, temperature=1.0, max_new_tokens=length)

    def ours(self) -> list[GeneratedGroup]:
        """Draw all candidates with our engine."""
        return NativeEngine(self.policy).generate(self.prompts, self.sampling, seed=SEED, progress=None)

    def theirs(self, batch: int, prompts: int | None = None) -> None:
        """Draw the candidates of the first `prompts` prompts (None: all) with HF, `batch` prompts
        at a time.
        """
        asked = self.prompts[:prompts]
        for start in range(0, len(asked), batch):
            ids = torch.tensor([prompt.ids for prompt in asked[start : start + batch]], device=self.hf.device)
            drawn = self.hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=self.sampling.candidates,
                max_new_tokens=self.sampling.max_new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
            wanted = (ids.shape[0] * self.sampling.candidates, ids.shape[1] + self.sampling.max_new_tokens)
            if drawn.shape != wanted:
                raise Different(f"HF drew {list(drawn.shape)} instead of {list(wanted)}")

    def best_batch(self) -> int:
        """Find the number of prompts in a batch at which HF is fastest, by one timing of each."""
        tried = min(len(self.prompts), HF_BATCHES[-1])
        self.theirs(1, 1)  # the first run is slower than others
        seconds = {batch: timed(partial(self.theirs, batch, tried)) for batch in HF_BATCHES if batch <= tried}
        return min(seconds, key=seconds.__getitem__)

    def planned(self) -> list[PlannedPass]:
        """Plan the passes of our side."""
        return planned_passes([prompt.ids for prompt in self.prompts], self.sampling)

    def checked(self) -> tuple[float, Counts]:
        """Compare log-probs of our draws with HF's forward pass, and the passes with the plan.

        Returns the largest difference relative to the largest log-prob, and what our side did.
        Raises Different.
        """
        with counted_passes(self.policy.model) as passes:
            groups = self.ours()
        if passes != [(each.tokens, each.predicting) for each in self.planned()]:
            raise Different("the passes that ran are not those that the scheduler planned")
        compared = list(zip(self.prompts, groups, strict=True))[:COMPARED]
        ours = [candidate.logprob for _, group in compared for candidate in group.candidates]
        theirs = [value for prompt, group in compared for value in hf_logprobs(self.hf, prompt, group)]
        of = partial(torch.tensor, dtype=torch.float64)
        difference = agree({"log-probs": of(ours)}, {"log-probs": of(theirs)}, tolerance=TOLERANCE)
        return difference, Counts.of(passes, groups)


@dataclass(frozen=True)
class Counts:
    """Work of our side in whole numbers, which another machine repeats exactly.

    passes: through the model. tokens: through the layers, prompts included. predicting: hidden
    states through the output layer. prefilled: prompt tokens through the layers.
    """

    passes: int
    tokens: int
    predicting: int
    prefilled: int

    @classmethod
    def of(cls, passes: Sequence[tuple[int, int]], groups: Sequence[GeneratedGroup]) -> Counts:
        """Sum up the passes that drew these groups."""
        tokens, predicting = (sum(each) for each in zip(*passes, strict=True))
        # Each drawn token but a candidate's last one is fed once; the rest are prompts.
        fed = sum(len(candidate.token_ids) - 1 for group in groups for candidate in group.candidates)
        return cls(len(passes), tokens, predicting, tokens - fed)


@torch.no_grad()
def hf_logprobs(hf: LlamaForCausalLM, prompt: Prompt, group: GeneratedGroup) -> list[float]:
    """Compute the log-probs of a group's candidates, all of one length, by HF's forward pass."""
    ids = torch.tensor([prompt.ids + candidate.token_ids for candidate in group.candidates], device=hf.device)
    logits = hf(input_ids=ids, use_cache=False).logits[:, len(prompt.ids) - 1 : -1]
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    picked = logprobs.gather(-1, ids[:, len(prompt.ids) :, None])
    values: list[float] = picked.sum(dim=(1, 2)).tolist()
    return values


def _measured(sides: Sides, rounds: int, clock: Clock) -> tuple[tuple[str, ...], Record]:
    """Compare both sides and time them: a line of the table, and what is kept of it."""
    difference, counts = sides.checked()
    batch = sides.best_batch()
    floor = Floor(sides.policy, sides.planned())
    timings = alternate(
        {"ours": sides.ours, "products": floor.products, "read": floor.read, "HF": partial(sides.theirs, batch)},
        rounds=rounds,
        clock=clock,
        warmup=0,  # all have just run, or need no start
    )
    with_floor = Timings(
        {
            **timings.seconds,
            "floor": tuple(sum(pair) for pair in zip(*(timings.seconds[s] for s in ("products", "read")), strict=True)),
        }
    )
    line = (
        sides.name,
        f"{len(sides.prompts)}",
        f"{timings.median('ours'):.2f}",
        f"{with_floor.median('floor'):.2f}",
        f"{timings.median('products'):.2f}",
        with_floor.shown("ours", "floor"),
        f"{TARGET}",
        f"{batch}",
        timings.shown("HF", "ours"),
        f"{difference:.1e}",
    )
    ratios = {"HF / ours": timings.ratio("HF", "ours"), "floor / ours": with_floor.ratio("floor", "ours")}
    return line, Record(f"{sides.name}; {len(sides.prompts)} prompts", vars(counts), ratios)
