"""What the cases do today. Both tables may only shrink."""

from __future__ import annotations

# Where the host waits for the device, by the work of a case, and how often in a step or call. None: as many times as
# FIGURES says. None of them is in forward, loss and backward ("gradients"). One at the end of a step is what there
# must be; megatron-core has the others.
_STEP: dict[str, int | None] = {
    # Compares the number of groups with 0 before it divides the gradients by it.
    "reduction: item at megatron/core/distributed/finalize_model_grads.py:finalize_model_grads"
    " <- exo_megatron/training/step.py:forward_gradients": 1,
    # Without Transformer Engine and apex: reads the norm of every gradient by itself.
    "optimizer: torch.tensor at megatron/core/utils.py:local_multi_tensor_l2_norm"
    " <- exo_megatron/training/step.py:train_step": None,
    # The norm of all gradients, by which clipping decides, and which metrics report.
    "optimizer: item at megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32"
    " <- exo_megatron/training/step.py:train_step": 1,
    # The one at the end: loss and statistics.
    "end: tolist at exo_megatron/training/step.py:_reduce": 1,
}
WAITS: dict[str, dict[str, int | None]] = {
    "train": _STEP,
    "train_oversized": _STEP,
    # The scheduler must know the tokens of each of the 12 passes before it lays out the next.
    "decode": {"decode: tolist at exo_megatron/rollout/native.py:_draw": 12},
    "score": {"score: tolist at exo_megatron/execution/forward.py:candidate_logprobs": 1},
}

# Operators per layer, views left out, in a step or in all passes of a call; gradients whose norm is read by itself.
FIGURES: dict[str, tuple[float, int]] = {
    "train-llama-bf16": (171, 15),
}
