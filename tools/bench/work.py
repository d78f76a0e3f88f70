"""The formula: floating-point operations of a training step, by layout, for any model.

A forward pass takes 2 FLOPs per weight and token in the layers' matrices, 4 per attention channel
and visible query-key pair, and 2 V H per position that is projected onto the vocabulary. A backward
pass takes twice that. A live reference adds one forward pass. Norms, activations, softmax and Adam
are not counted, nor what a step computes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from exo_megatron.config.describe import nearest
from exo_megatron.conversion.importing import hf_spec
from exo_megatron.errors import ConfigError
from exo_megatron.models.spec import ModelSpec
from tools.bench.lengths import Lengths

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSize:
    """What the FLOPs of a model depend on.

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


MODELS = {
    "7b": llama_size("Llama 2 7B", hidden=4096, layers=32, ffn=11008, kv=4096, vocab=32_000),
    "8b": llama_size("Llama 3.1 8B", hidden=4096, layers=32, ffn=14336, kv=1024, vocab=128_256),
}


def model_size(name: str) -> ModelSize:
    """Find a model by a name of MODELS, or by the directory of an HF checkpoint.

    Raises ConfigError for anything else, CheckpointError for a config.json that is not supported.
    """
    if name in MODELS:
        return MODELS[name]
    if not Path(name).is_dir():
        raise ConfigError(
            "--model",
            f"is {name!r}",
            expected=f"one of {', '.join(MODELS)}, or a directory with an HF config.json",
            fix=nearest(name, MODELS) or "give the directory",
        )
    return ModelSize.of(hf_spec(Path(name))[1], name)


@dataclass(frozen=True)
class Work:
    """What passes through a model: tokens, visible query-key pairs, positions that are projected."""

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


def padded_work(batches: Iterable[Sequence[int]]) -> Work:
    """Count the work of sequences that are padded to the longest of their batch, as causal
    attention on padded sequences does it.
    """
    sizes = [(len(batch), max(batch)) for batch in batches]
    tokens = sum(count * longest for count, longest in sizes)
    return Work(tokens, sum(count * longest**2 for count, longest in sizes) / 2, tokens)


def chunks(items: Sequence[T], size: int) -> list[list[T]]:
    """Split items into lists of `size`; the last may be shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


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


@dataclass(frozen=True)
class Rung:
    """One step down the waterfall: what is switched on, its work, whether a reference runs."""

    name: str
    work: Work
    live: bool

    def flops(self, model: ModelSize) -> float:
        """Compute the FLOPs of a training step, without Adam."""
        return self.work.step_flops(model, live=self.live)


PLAIN, SHARING, PACKING = "plain", "+ shared prompts", "+ packing"
RESPONSE_ONLY, STORED = "+ response-only output layer", "+ stored log-probs"


def waterfall(groups: Sequence[Lengths]) -> list[Rung]:
    """List what is switched on in turn. Packing changes no FLOPs, only how they are batched."""
    wide, narrow = (shared_work(groups, response_only=only) for only in (False, True))
    return [
        Rung(PLAIN, separate_work(groups), live=True),
        Rung(SHARING, wide, live=True),
        Rung(PACKING, wide, live=True),
        Rung(RESPONSE_ONLY, narrow, live=True),
        Rung(STORED, narrow, live=False),
    ]
