"""What the cases do today: operators, copies to the device, waits of the host. The table may only shrink."""

from __future__ import annotations

from dataclasses import dataclass

_P2P = "megatron/core/pipeline_parallel/p2p_communication.py"
_MOE = "megatron/core/transformer/moe"
_STEP = "exo_megatron/training/step.py"
_PARTS = "exo_megatron/training/oversized.py"

# Short names of the places where the host waits, and why it does. Forward, loss and backward ("gradients") have none
# but those of pipeline stages and of experts.
PLACES = {
    # The one at the end of a step that there must be: loss and statistics.
    "statistics": f"end: tolist at {_STEP}:_reduce",
    # megatron-core compares the number of groups with 0 before it divides the gradients by it.
    "units": "reduction: item at megatron/core/distributed/finalize_model_grads.py:finalize_model_grads"
    f" <- {_STEP}:forward_gradients",
    # The norm of all gradients, with which they are clipped.
    "norm": f"optimizer: item at megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32 <- {_STEP}:train_step",
    # Without Transformer Engine and apex megatron-core reads the norm of every gradient by itself.
    "norms": f"optimizer: torch.tensor at megatron/core/utils.py:local_multi_tensor_l2_norm <- {_STEP}:train_step",
    # Micro-batches differ in length, so that megatron-core sends their shapes ahead, to the host.
    "shapes": f"gradients: tolist at {_P2P}:_communicate_shapes <- {_STEP}:forward_gradients",
    # The same, for the parts of an oversized group.
    "part_shapes": f"gradients: tolist at {_P2P}:_communicate_shapes <- {_PARTS}:_schedule",
    # megatron-core waits for the whole device after every transfer (batch_p2p_sync), and after every one of shapes.
    "shape_transfers": f"gradients: torch.cuda.synchronize at {_P2P}:_communicate_shapes <- {_STEP}:forward_gradients",
    "transfers": f"gradients: torch.cuda.synchronize at {_P2P}:_communicate <- {_STEP}:forward_gradients",
    "part_shape_transfers": f"gradients: torch.cuda.synchronize at {_P2P}:_communicate_shapes <- {_PARTS}:_schedule",
    "part_transfers": f"gradients: torch.cuda.synchronize at {_P2P}:_communicate <- {_PARTS}:_schedule",
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


def _step(operators: float, uploads: int, norms: int, **waits: int) -> Figures:
    return Figures(operators, uploads, {"units": 1, "norms": norms, "norm": 1, "statistics": 1, **waits})


FIGURES = {
    "train-llama-bf16": _step(96, 19, 15),
    "train-llama-tp2-bf16-rank0": _step(98, 19, 15),
    "train-llama-tp2-bf16-rank1": _step(96, 19, 10),
    "train-llama-dp2-bf16-rank0": _step(84, 19, 8),
    "train-llama-tp2-dp2-bf16-rank0": _step(86, 19, 8),
    "train-llama-bf16-recompute-selective": _step(117, 19, 15),
    "train-llama-bf16-recompute-full": _step(128, 19, 15),
    "train-llama-tp2-bf16-recompute-selective-rank0": _step(119, 19, 15),
    "train-llama-tp2-bf16-recompute-full-rank0": _step(130, 19, 15),
    "train_oversized-llama-bf16": _step(458, 106, 15),
    "train_oversized-llama-tp2-bf16-rank0": _step(460, 106, 15),
    "train-gpt2-bf16": _step(117, 19, 28),
    "train-gpt2-tp2-bf16-rank0": _step(123, 19, 28),
    "train-neox-bf16": _step(129, 19, 28),
    "train-neox-tp2-bf16-rank0": _step(135, 19, 28),
    "train-gemma2-bf16": _step(1089.5, 19, 18),
    "train-gemma2-tp2-bf16-rank0": _step(1142.5, 19, 18),
    "train-gemma3-bf16": _step(154, 19, 22),
    "train-gemma3-tp2-bf16-rank0": _step(160, 19, 22),
    "train-qwen3-bf16": _step(110, 19, 18),
    "train-qwen3-tp2-bf16-rank0": _step(114, 19, 18),
    "train-moe-bf16": _step(199.5, 19, 29, experts=2, selected=4),
    "train-moe-tp2-bf16-rank0": _step(210.5, 19, 29, experts=2, selected=4),
    "train-moe-tp2-ep2-bf16-rank0": _step(175.5, 19, 21, experts=2, selected=4),
    "train-moe-tp2-dp2-ep2-bf16-rank0": _step(157.5, 19, 11, experts=2, selected=4),
    "train-moe-dp2-ep2-bf16-rank0": _step(162.5, 19, 15, experts=2, selected=4),
    "train-llama-fp32": _step(513, 19, 15),
    "train-llama-tp2-fp32-rank0": _step(543, 19, 15),
    "decode-llama-bf16": Figures(365, 103, {"tokens": 12}),
    "decode-llama-tp2-bf16-rank0": Figures(367, 103, {"tokens": 12}),
    "train-llama-pp2-bf16-rank0": _step(96, 19, 13, shapes=1, shape_transfers=2, transfers=2),
    "train-llama-pp2-bf16-rank1": _step(96, 20, 14, shapes=1, shape_transfers=2, transfers=2),
    "train_oversized-llama-pp2-bf16-rank0": _step(
        458, 109, 13, shapes=2, part_shapes=3, shape_transfers=3, transfers=3, part_shape_transfers=5, part_transfers=5
    ),
    "train_oversized-llama-pp2-bf16-rank1": _step(
        458, 111, 14, shapes=2, part_shapes=4, shape_transfers=3, transfers=3, part_shape_transfers=5, part_transfers=5
    ),
    "decode-llama-pp2-bf16-rank0": Figures(365, 79, {"tokens": 12}),
    "decode-llama-pp2-bf16-rank1": Figures(365, 103, {"tokens": 12}),
    "score-llama-pp2-bf16-rank0": Figures(32, 14, {"scores": 1}),
    "score-llama-pp2-bf16-rank1": Figures(32, 15, {"scores": 1}),
    "score-llama-bf16": Figures(32, 15, {"scores": 1}),
    "score-llama-tp2-bf16-rank0": Figures(32, 15, {"scores": 1}),
}
