"""The formula: floating-point operations of a training step, by layout, for any model.

A forward pass takes 2 FLOPs per weight and token in the layers' matrices, 4 per attention channel
and visible query-key pair, and 2 V H per position that is projected onto the vocabulary. A backward
pass takes twice that. A live reference adds one forward pass. Norms, activations, softmax and Adam
are not counted, nor what a step computes again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from exo_megatron.data.groups import Group
from exo_megatron.models.spec import ModelSpec


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompt and candidates of one group, in tokens."""

    prompt: int
    candidates: tuple[int, ...]

    @classmethod
    def of(cls, group: Group) -> Lengths:
        """Take the lengths of a group of tokens."""
        return cls(len(group.prompt), tuple(len(candidate) for candidate in group.candidates))


@dataclass(frozen=True)
class ModelSize:
    """The sizes on which the FLOPs of a model depend.

    Attributes:
        name: for tables.
        linear: weights of the layers' matrices that a token passes through.
        channels: width of attention's queries, summed over the layers.
        head: weights of the output layer, V H.
    """

    name: str
    linear: int
    channels: int
    head: int

    @classmethod
    def of(cls, spec: ModelSpec, name: str) -> ModelSize:
        """Take the sizes of a model. Of experts, those that a token is sent to count, and the
        router.
        """
        query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        attention = spec.hidden_size * (2 * query + 2 * key)
        matrices = 3 if spec.gated else 2
        block = matrices * spec.hidden_size * spec.ffn_hidden_size
        if spec.experts is not None:
            of_expert = matrices * spec.hidden_size * spec.experts.ffn_hidden_size
            block = spec.experts.per_token * of_expert + spec.hidden_size * spec.experts.count
        return cls(name, spec.layers * (attention + block), spec.layers * query, spec.vocab_size * spec.hidden_size)

    @property
    def head_share(self) -> float:
        """Share of the output layer in the linear FLOPs of a token that passes through all of it."""
        return self.head / (self.linear + self.head)


def llama_size(name: str, *, hidden: int, layers: int, ffn: int, kv: int, vocab: int) -> ModelSize:
    """Compute the sizes of a Llama whose keys have `kv` channels."""
    weights = layers * hidden * (2 * hidden + 2 * kv + 3 * ffn)
    return ModelSize(name, weights, layers * hidden, vocab * hidden)


@dataclass(frozen=True)
class Work:
    """The quantities that pass through a model: tokens, visible query-key pairs, positions that are projected."""

    tokens: int
    pairs: float
    projected: int

    def flops(self, model: ModelSize) -> float:
        """Compute the FLOPs of a forward pass."""
        return 2 * (model.linear * self.tokens + 2 * model.channels * self.pairs + model.head * self.projected)

    def step_flops(self, model: ModelSize, *, live: bool) -> float:
        """Compute the FLOPs of forward and backward, and of a live reference's forward."""
        return (4 if live else 3) * self.flops(model)


def separate_work(groups: Iterable[Lengths]) -> Work:
    """Count the work of one sequence per candidate, every position projected, without padding."""
    texts = [group.prompt + candidate for group in groups for candidate in group.candidates]
    return Work(sum(texts), sum(length**2 for length in texts) / 2, sum(texts))


def shared_work(groups: Iterable[Lengths], *, response_only: bool) -> Work:
    """Count the work of groups that share their prompts.

    response_only: only the positions that predict a candidate's token are projected.
    """
    tokens = projected = 0
    pairs = 0.0
    for group in groups:
        own = sum(group.candidates)
        tokens += group.prompt + own
        pairs += group.prompt**2 / 2 + sum(group.prompt * r + r**2 / 2 for r in group.candidates)
        projected += 1 + own - len(group.candidates) if response_only else group.prompt + own
    return Work(tokens, pairs, projected)
