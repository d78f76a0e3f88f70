"""What the cases do today: where the host waits for the device, and operators per layer. The tables may only shrink."""

from __future__ import annotations

from dataclasses import dataclass

# Short names of the places where the host waits, and why it does. Forward, loss and backward ("gradients") have none
# but those of pipeline stages and of experts.
PLACES = {
    # The one at the end of a step that there must be: loss and statistics.
    "statistics": "end: tolist at exo_megatron/training/step.py:_reduce",
    # megatron-core compares the number of groups with 0 before it divides the gradients by it.
    "units": "reduction: item at megatron/core/distributed/finalize_model_grads.py:finalize_model_grads"
    " <- exo_megatron/training/step.py:forward_gradients",
    # The norm of all gradients, with which they are clipped.
    "norm": "optimizer: item at megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32"
    " <- exo_megatron/training/step.py:train_step",
    # Without Transformer Engine and apex megatron-core reads the norm of every gradient by itself.
    "norms": "optimizer: torch.tensor at megatron/core/utils.py:local_multi_tensor_l2_norm"
    " <- exo_megatron/training/step.py:train_step",
    # Micro-batches differ in length, so that megatron-core sends their shapes ahead, to the host.
    "shapes": "gradients: tolist at megatron/core/pipeline_parallel/p2p_communication.py:_communicate_shapes"
    " <- exo_megatron/training/step.py:forward_gradients",
    # The same, for the parts of an oversized group.
    "part_shapes": "gradients: tolist at megatron/core/pipeline_parallel/p2p_communication.py:_communicate_shapes"
    " <- exo_megatron/training/oversized.py:_schedule",
    # megatron-core waits for the whole device after every transfer (batch_p2p_sync), and after every one of shapes.
    "shape_transfers": "gradients: torch.cuda.synchronize at megatron/core/pipeline_parallel/p2p_communication.py:_communicate_shapes"
    " <- exo_megatron/training/step.py:forward_gradients",
    "transfers": "gradients: torch.cuda.synchronize at megatron/core/pipeline_parallel/p2p_communication.py:_communicate"
    " <- exo_megatron/training/step.py:forward_gradients",
    "part_shape_transfers": "gradients: torch.cuda.synchronize at megatron/core/pipeline_parallel/p2p_communication.py:_communicate_shapes"
    " <- exo_megatron/training/oversized.py:_schedule",
    "part_transfers": "gradients: torch.cuda.synchronize at megatron/core/pipeline_parallel/p2p_communication.py:_communicate"
    " <- exo_megatron/training/oversized.py:_schedule",
    # The host must know how many tokens go to each expert, in every layer.
    "experts": "gradients: Event.synchronize at megatron/core/transformer/moe/token_dispatcher.py:_maybe_dtoh_and_synchronize"
    " <- exo_megatron/models/layers.py:forward",
    # megatron-core selects the tokens of the experts and their weights by masks, whose sums the host reads.
    "selected": "gradients: masked_select at megatron/core/transformer/moe/moe_utils.py:permute"
    " <- exo_megatron/models/layers.py:forward",
    # The scheduler must know the tokens of each of the 12 passes before it lays out the next.
    "tokens": "decode: tolist at exo_megatron/rollout/native.py:_draw",
    # The result.
    "scores": "score: tolist at exo_megatron/execution/forward.py:candidate_logprobs",
}


@dataclass(frozen=True)
class Figures:
    """operators: per layer, views left out, in a step or in all passes of a call. waits: by the names in PLACES."""

    operators: float
    waits: dict[str, int]


def _step(operators: float, norms: int, **waits: int) -> Figures:
    return Figures(operators, {"units": 1, "norms": norms, "norm": 1, "statistics": 1, **waits})


FIGURES = {
    "train-llama-bf16": _step(171, 15),
    "train-llama-tp2-bf16-rank0": _step(173, 15),
    "train-llama-tp2-bf16-rank1": _step(171, 10),
    "train-llama-dp2-bf16-rank0": _step(150, 8),
    "train-llama-tp2-dp2-bf16-rank0": _step(152, 8),
    "train-llama-bf16-recompute-selective": _step(194, 15),
    "train-llama-bf16-recompute-full": _step(219, 15),
    "train-llama-tp2-bf16-recompute-selective-rank0": _step(196, 15),
    "train-llama-tp2-bf16-recompute-full-rank0": _step(221, 15),
    "train_oversized-llama-bf16": _step(831, 15),
    "train_oversized-llama-tp2-bf16-rank0": _step(833, 15),
    "train-gpt2-bf16": _step(157, 28),
    "train-gpt2-tp2-bf16-rank0": _step(163, 28),
    "train-neox-bf16": _step(169, 28),
    "train-neox-tp2-bf16-rank0": _step(175, 28),
    "train-gemma2-bf16": _step(1416, 18),
    "train-gemma2-tp2-bf16-rank0": _step(1485, 18),
    "train-gemma3-bf16": _step(912.5, 22),
    "train-gemma3-tp2-bf16-rank0": _step(947, 22),
    "train-qwen3-bf16": _step(237, 18),
    "train-qwen3-tp2-bf16-rank0": _step(241, 18),
    "train-moe-bf16": _step(362.5, 29, experts=2, selected=4),
    "train-moe-tp2-bf16-rank0": _step(373.5, 29, experts=2, selected=4),
    "train-moe-tp2-ep2-bf16-rank0": _step(282.5, 21, experts=2, selected=4),
    "train-moe-tp2-dp2-ep2-bf16-rank0": _step(251, 11, experts=2, selected=4),
    "train-moe-dp2-ep2-bf16-rank0": _step(262, 15, experts=2, selected=4),
    "train-llama-fp32": _step(827, 15),
    "train-llama-tp2-fp32-rank0": _step(874, 15),
    "decode-llama-bf16": Figures(533, {"tokens": 12}),
    "decode-llama-tp2-bf16-rank0": Figures(535, {"tokens": 12}),
    "train-llama-pp2-bf16-rank0": _step(171, 13, shapes=1, shape_transfers=2, transfers=2),
    "train-llama-pp2-bf16-rank1": _step(171, 14, shapes=1, shape_transfers=2, transfers=2),
    "train_oversized-llama-pp2-bf16-rank0": _step(
        831, 13, shapes=2, part_shapes=3, shape_transfers=3, transfers=3, part_shape_transfers=5, part_transfers=5
    ),
    "train_oversized-llama-pp2-bf16-rank1": _step(
        831, 14, shapes=2, part_shapes=4, shape_transfers=3, transfers=3, part_shape_transfers=5, part_transfers=5
    ),
    "decode-llama-pp2-bf16-rank0": Figures(533, {"tokens": 12}),
    "decode-llama-pp2-bf16-rank1": Figures(533, {"tokens": 12}),
    "score-llama-pp2-bf16-rank0": Figures(48, {"scores": 1}),
    "score-llama-pp2-bf16-rank1": Figures(48, {"scores": 1}),
    "score-llama-bf16": Figures(48, {"scores": 1}),
    "score-llama-tp2-bf16-rank0": Figures(48, {"scores": 1}),
}
