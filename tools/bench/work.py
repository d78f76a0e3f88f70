"""Models by name, and the work of the steps that benchmarks compare.

The formula is in exo_megatron/diagnosis/work.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from exo_megatron.config.describe import nearest
from exo_megatron.conversion.importing import hf_spec
from exo_megatron.diagnosis.work import Lengths, ModelSize, Work, llama_size, separate_work, shared_work
from exo_megatron.errors import ConfigError

T = TypeVar("T")


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
