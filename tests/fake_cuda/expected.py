"""What the cases do today: operators, copies to the device, waits of the host. The table may only shrink."""

from __future__ import annotations

from dataclasses import dataclass

_MOE = "megatron/core/transformer/moe"
_STEP = "exo_megatron/training/step.py"

# Short names of the places where the host waits, and why it does. Forward, loss and backward ("gradients") have none
# but those of experts.
PLACES = {
    # The one of a step, at its end: loss, norm and statistics.
    "statistics": f"end: tolist at {_STEP}:_reduce",
    # The host must know how many tokens go to each expert, in every layer.
    "experts": f"gradients: Event.synchronize at {_MOE}/token_dispatcher.py:_maybe_dtoh_and_synchronize"
    " <- exo_megatron/models/layers.py:forward",
    # megatron-core selects the tokens of the experts and their weights by masks, whose sums the host reads.
    "selected": f"gradients: masked_select at {_MOE}/moe_utils.py:permute <- exo_megatron/models/layers.py:forward",
    # The scheduler must know the tokens of each of the 12 passes before it lays out the next.
    "tokens": "decode: tolist at exo_megatron/rollout/native.py:_draw",
    # The result.
    "scores": "score: tolist at exo_megatron/execution/forward.py:candidate_logprobs",
}


@dataclass(frozen=True)
class Figures:
    """What a step or call does, of a model with two layers on every pipeline stage.

    operators: per layer, views left out.
    uploads: copies from host to device.
    waits: by the names in PLACES.
    """

    operators: float
    uploads: int
    waits: dict[str, int]


def _step(operators: float, uploads: int = 1, **waits: int) -> Figures:
    return Figures(operators, uploads, {"statistics": 1, **waits})


FIGURES: dict[str, Figures] = {}
