"""A small Llama, fine-tuned on the texts and then frozen; a policy adds a trained bias to its output logits.

The bias is the same in every state, so the policy cannot represent pi*: it has to choose what to say more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from exo_megatron.evaluation.estimates import PromptMeans
from frontier.reviews import BEGIN, END, SPECIAL, UNKNOWN, Reviews
from frontier.sweep import Groups, Run

TEMPERATURE = 0.8
PROMPT = 3
"""Tokens of a prompt: BEGIN and two words."""

NEW = 18
"""Tokens after which a text is cut."""

WHOLE = PROMPT + NEW
TRAIN_PROMPTS, TEST_PROMPTS = 3200, 640
MOST_CANDIDATES = 32
HELD_OUT = 5
"""One in so many openings is for test prompts."""

TEST_SAMPLES = 4
"""Texts at each test prompt."""

SFT_TEXTS, SFT_RATE, SFT_DECAY = 64, 5e-3, 0.05
SAMPLED_AT_ONCE = 4096
IGNORED = -100


def make_model(vocabulary: int, *, seed: int) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WHOLE,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def fine_tune(model: LlamaForCausalLM, reviews: Reviews, *, epochs: int, seed: int) -> None:
    """Train the model on the texts, cut at WHOLE tokens; UNKNOWN is no target."""
    texts = torch.full((len(reviews.texts), WHOLE), IGNORED)
    for i, text in enumerate(reviews.texts):
        ids = [BEGIN, *text, END][:WHOLE]
        texts[i, : len(ids)] = torch.tensor(ids)
    steps = epochs * (len(texts) // SFT_TEXTS)
    optimizer = torch.optim.AdamW(model.parameters(), SFT_RATE, betas=(0.9, 0.98), weight_decay=SFT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, SFT_RATE, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % (len(texts) // SFT_TEXTS) == 0:
            order = torch.randperm(len(texts), generator=generator)
        place = step % (len(texts) // SFT_TEXTS)
        batch = texts[order[place * SFT_TEXTS : (place + 1) * SFT_TEXTS]]
        labels = batch.masked_fill(batch == UNKNOWN, IGNORED)
        loss = model(input_ids=batch.clamp(min=END), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Samples:
    """N texts of a policy.

    Attributes:
        prompts: [N, PROMPT].
        words: [N, NEW], END from the end of the text on.
        lengths: [N], tokens that were drawn, END included; a text that is cut has NEW.
        hidden: [N, NEW, H], the states that predict the words.
        logps: [N] fp64, log-probs of the texts under the policy.
        kls: [N] fp64, sums over the states of the exact KL of the next token to the reference.
    """

    prompts: Tensor
    words: Tensor
    lengths: Tensor
    hidden: Tensor
    logps: Tensor
    kls: Tensor

    @property
    def whole(self) -> Tensor:
        """Prompts and words, [N, WHOLE]."""
        return torch.cat([self.prompts, self.words], dim=1)


class BiasPolicy(torch.nn.Module):
    """The model, which it freezes, with a bias on its logits; it begins at zero."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        model.eval().requires_grad_(False)
        self.body = model.model
        self.output = model.lm_head.weight.T / TEMPERATURE
        self.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        self.never = torch.zeros_like(self.bias.data).index_fill(0, torch.tensor([UNKNOWN, BEGIN]), -40.0)

    def trained(self) -> list[torch.nn.Parameter]:
        """See sweep.Policy."""
        return [self.bias]

    def token_log_probs(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Log-probs of the next token at TEMPERATURE, [n, V], after hidden states [n, H]."""
        return torch.addmm(self.never + bias / TEMPERATURE, hidden, self.output).log_softmax(dim=-1)

    @torch.no_grad()
    def draw(self, prompts: Tensor, *, seed: int) -> Samples:
        """Draw one text after each prompt [N, PROMPT]."""
        generator = torch.Generator().manual_seed(seed)
        parts = [self._draw(part, generator) for part in prompts.split(SAMPLED_AT_ONCE)]
        return Samples(*(torch.cat(each) for each in zip(*(vars(part).values() for part in parts), strict=True)))

    def _draw(self, prompts: Tensor, generator: torch.Generator) -> Samples:
        count, moved = len(prompts), bool(self.bias.any())
        words, hidden = torch.full((count, NEW), END), torch.zeros(count, NEW, len(self.output))
        lengths, sums = torch.zeros(count, dtype=torch.int64), torch.zeros(2, count, dtype=torch.float64)
        going, cache, newest = torch.ones(count, dtype=torch.bool), DynamicCache(), prompts
        for place in range(NEW):
            out = self.body(newest, None, None, cache, use_cache=True)
            hidden[:, place] = out.last_hidden_state[:, -1]
            policy = self.token_log_probs(hidden[:, place], self.bias)
            newest = torch.where(going[:, None], _draw_one(policy.exp(), generator), END)
            sums[0] += torch.where(going, policy.gather(1, newest)[:, 0].double(), 0.0)
            if moved:
                reference = self.token_log_probs(hidden[:, place], torch.zeros_like(self.bias))
                sums[1] += torch.where(going, (policy.exp() * (policy - reference)).sum(dim=-1).double(), 0.0)
            words[:, place] = newest[:, 0]
            lengths += going
            going = going & (newest[:, 0] != END)
        return Samples(prompts, words, lengths, hidden, sums[0], sums[1])


def _draw_one(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a column of each line [n, V] by its cumulative probabilities, [n, 1]."""
    cumulative = probabilities.cumsum(dim=-1)
    uniform = torch.rand(len(probabilities), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=probabilities.shape[1] - 1)


@dataclass(frozen=True)
class TransformerWorld:
    """A frozen model, MOST_CANDIDATES candidates of each training prompt, and the test prompts."""

    reviews: Reviews
    model: LlamaForCausalLM
    candidates: Samples
    groups: Groups
    test_prompts: Tensor

    @classmethod
    def of(cls, reviews: Reviews, model: LlamaForCausalLM, *, seed: int) -> TransformerWorld:
        """Draw the candidates. No test prompt is a training prompt; they are the same for every seed."""
        openings = sorted({text[: PROMPT - 1] for text in reviews.texts if len(text) >= PROMPT})
        known = torch.tensor([[BEGIN, *opening] for opening in openings if min(opening) >= len(SPECIAL)])
        known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
        held_out = len(known) // HELD_OUT
        test = _draw_lines(known[:held_out], TEST_PROMPTS, seed=0)
        prompts = _draw_lines(known[held_out:], TRAIN_PROMPTS, seed=seed)
        candidates = BiasPolicy(model).draw(prompts.repeat_interleave(MOST_CANDIDATES, dim=0), seed=seed)
        groups = Groups(
            rewards=reviews.rewards(candidates.whole).view(TRAIN_PROMPTS, MOST_CANDIDATES),
            reference_logps=candidates.logps.view(TRAIN_PROMPTS, MOST_CANDIDATES),
        )
        return cls(reviews, model, candidates, groups, test)

    def policy(self, run: Run) -> BiasPolicy:
        """See sweep.World."""
        return BiasPolicy(self.model)

    def logps(self, policies: Sequence[BiasPolicy], chosen: Tensor, K: int) -> Tensor:
        """See sweep.World. pi_theta = pi_sft exp(bias / tau) / Z, and only Z needs the other words."""
        numbers = (chosen[:, None] * MOST_CANDIDATES + torch.arange(K)).reshape(-1)
        present = torch.arange(NEW) < self.candidates.lengths[numbers, None]
        hidden, words = self.candidates.hidden[numbers][present], self.candidates.words[numbers][present]
        with torch.no_grad():
            reference = BiasPolicy(self.model)
            pi_sft = reference.token_log_probs(hidden, reference.bias).exp()
        tilts = torch.stack([policy.bias for policy in policies], dim=1) / TEMPERATURE
        log_ratios = (tilts[words] - (pi_sft @ tilts.exp()).log()).double()
        sums = torch.zeros(len(numbers), len(policies), dtype=torch.float64)
        sums = sums.index_add(0, present.nonzero()[:, 0], log_ratios)
        return (self.candidates.logps[numbers, None] + sums).T.reshape(len(policies), len(chosen), K)

    def evaluate(self, policy: BiasPolicy) -> PromptMeans:
        """See sweep.World: TEST_SAMPLES texts at each test prompt."""
        samples = policy.draw(self.test_prompts.repeat_interleave(TEST_SAMPLES, dim=0), seed=1 << 20)
        rewards = self.reviews.rewards(samples.whole)
        return PromptMeans(*(each.view(-1, TEST_SAMPLES).mean(dim=1).numpy() for each in (rewards, samples.kls)))


def _draw_lines(lines: Tensor, count: int, *, seed: int) -> Tensor:
    """`count` of the lines, with replacement."""
    return lines[torch.randint(len(lines), (count,), generator=torch.Generator().manual_seed(seed))]
