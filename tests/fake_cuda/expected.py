"""What the cases do today: operators, copies to the device, waits of the host. The table may only shrink."""

from __future__ import annotations

from dataclasses import dataclass

_STEP = "exo_megatron/training/step.py"

# Short names of the places where the host waits, and why it does. Forward, loss and backward ("gradients") have none
# but those of experts.
PLACES = {
    # The one of a step, at its end: loss, norm and statistics.
    "statistics": f"end: tolist at {_STEP}:_reduce",
    # The host must know how many tokens go to each expert, in every layer.
    "experts": "gradients: tolist at exo_megatron/models/expert_exchange.py:_read",
    # The scheduler must know the tokens of each of the 12 passes before it lays out the next.
    "tokens": "decode: tolist at exo_megatron/rollout/native.py:_draw",
    # The result.
    "scores": "score: tolist at exo_megatron/execution/forward.py:candidate_logprobs",
}


@dataclass(frozen=True)
class Figures:
    """What a step or call does, of a model with two layers on every pipeline stage, four where windows alternate.

    operators: per layer, views left out.
    uploads: copies from host to device.
    waits: by the names in PLACES.
    """

    operators: float
    uploads: int
    waits: dict[str, int]


def _step(operators: float, uploads: int = 1, **waits: int) -> Figures:
    return Figures(operators, uploads, {"statistics": 1, **waits})


FIGURES = {
    "train-llama-bf16": _step(68),
    "train-llama-tp2-bf16-rank0": _step(70),
    "train-llama-tp2-bf16-rank1": _step(70),
    "train-llama-dp2-bf16-rank0": _step(68),
    "train-llama-tp2-dp2-bf16-rank0": _step(70),
    "train-llama-bf16-recompute-selective": _step(89),
    "train-llama-bf16-recompute-full": _step(100),
    "train-llama-tp2-bf16-recompute-selective-rank0": _step(91),
    "train-llama-tp2-bf16-recompute-full-rank0": _step(102),
    "train_oversized-llama-bf16": _step(410, 2),
    "train_oversized-llama-tp2-bf16-rank0": _step(412, 2),
    "train-large-bf16": _step(68),
    "train-large_tied-tp2-bf16-rank0": _step(70),
    "train-gpt2-bf16": _step(65),
    "train-gpt2-tp2-bf16-rank0": _step(71),
    "train-neox-bf16": _step(77),
    "train-neox-tp2-bf16-rank0": _step(83),
    "train-gemma2-bf16": _step(649.5),
    "train-gemma2-tp2-bf16-rank0": _step(702.5),
    "train-gemma3-bf16": _step(110),
    "train-gemma3-tp2-bf16-rank0": _step(116),
    "train-qwen3-bf16": _step(74),
    "train-qwen3-tp2-bf16-rank0": _step(78),
    "train-moe-bf16": _step(110, experts=2),
    "train-moe-tp2-bf16-rank0": _step(113, experts=2),
    "train-moe-tp2-ep2-bf16-rank0": _step(116, experts=2),
    "train-moe-tp2-dp2-ep2-bf16-rank0": _step(116, experts=2),
    "train-moe-dp2-ep2-bf16-rank0": _step(113, experts=2),
    "train-llama-fp32": _step(299),
    "train-llama-tp2-fp32-rank0": _step(329),
    "decode-llama-bf16": Figures(365, 87, {"tokens": 12}),
    "decode-llama-tp2-bf16-rank0": Figures(367, 87, {"tokens": 12}),
    "train-llama-pp2-bf16-rank0": _step(68),
    "train-llama-pp2-bf16-rank1": _step(68),
    "train_oversized-llama-pp2-bf16-rank0": _step(410, 2),
    "train_oversized-llama-pp2-bf16-rank1": _step(410, 2),
    "decode-llama-pp2-bf16-rank0": Figures(365, 63, {"tokens": 12}),
    "decode-llama-pp2-bf16-rank1": Figures(365, 87, {"tokens": 12}),
    "score-llama-pp2-bf16-rank0": Figures(32, 1, {"scores": 1}),
    "score-llama-pp2-bf16-rank1": Figures(32, 2, {"scores": 1}),
    "score-llama-bf16": Figures(32, 2, {"scores": 1}),
    "score-llama-tp2-bf16-rank0": Figures(32, 2, {"scores": 1}),
}
