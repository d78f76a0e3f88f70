"""The gradient of the vocabulary matrix under megatron-core's gradient buffers (the real ones: test_align_parity)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exo_megatron.logprobs.softmax import Tiling, VocabShard
from exo_megatron.logprobs.vocab_parallel import sharded_logprobs
from exo_megatron.models.main_grad import add_gradients_in_place, look_up

VOCAB, PADDED, HIDDEN = 11, 16, 6
TOKEN_PREDICTOR, TOKEN_TARGET = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 10, 10, 0])


def weight_with_buffer(dtype: torch.dtype, buffer_dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """As megatron-core's DistributedDataParallel prepares it, with something in the buffer already."""
    weight = torch.nn.Parameter(torch.randn(PADDED, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype))
    weight.main_grad = torch.full(weight.shape, 2.0, dtype=buffer_dtype)
    weight.grad_added_to_main_grad = False
    return weight


def hidden(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def backward(weight: Tensor, kept: int = 100) -> None:
    shard = VocabShard(group=None, rank=0, ranks=1, vocab_size=VOCAB)
    rows = hidden(weight.dtype)
    logps = sharded_logprobs(
        rows, weight, TOKEN_PREDICTOR, TOKEN_TARGET, shard, temperature=0.8, tiling=Tiling(4, kept, 2)
    )
    logps.backward(torch.tensor([1.0, -3.0, 0.5, 2.0]))


def plain_gradient(dtype: torch.dtype) -> Tensor:
    """fp32 gradient of the same, without a buffer and without rounding."""
    weight = weight_with_buffer(dtype).detach().float().requires_grad_()
    logits = hidden(dtype).detach().float() @ weight[:VOCAB].t() / 0.8
    logps = torch.log_softmax(logits, dim=-1)[TOKEN_PREDICTOR, TOKEN_TARGET]
    (gradient,) = torch.autograd.grad(logps, weight, torch.tensor([1.0, -3.0, 0.5, 2.0]))
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 100])
def test_added_to_the_buffer_in_fp32(dtype: torch.dtype, kept: int) -> None:
    """Twice, as two micro-batches do. Nothing is left in `grad`, and megatron-core is told."""
    weight = weight_with_buffer(dtype)
    for _ in range(2):
        backward(weight, kept)
    torch.testing.assert_close(weight.main_grad, 2.0 + 2 * plain_gradient(dtype), rtol=1e-5, atol=1e-5)
    assert weight.grad is None and weight.grad_added_to_main_grad
    assert torch.equal(weight.main_grad[VOCAB:], torch.full((PADDED - VOCAB, HIDDEN), 2.0))


def test_hooks_behind_the_weight_run_without_a_gradient() -> None:
    """megatron-core counts a parameter as done in a hook on its gradient accumulator."""
    weight = weight_with_buffer(torch.float32)
    calls: list[object] = []
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *unused: calls.append(unused))
    backward(weight)
    assert len(calls) == 1


def test_weight_tied_to_embeddings_of_the_same_stage() -> None:
    """Both gradients go to the buffer, and megatron-core must not add what autograd returns for them."""
    weight = weight_with_buffer(torch.float32)
    weight.zero_out_wgrad = True
    model = torch.nn.Module()
    model.weight = weight
    add_gradients_in_place(model)
    embedded = look_up(torch.tensor([1, 1]), weight)
    shard = VocabShard(group=None, rank=0, ranks=1, vocab_size=VOCAB)
    logps = sharded_logprobs(
        hidden(torch.float32), weight, TOKEN_PREDICTOR, TOKEN_TARGET, shard, temperature=0.8, tiling=Tiling(4, 1)
    )
    (embedded.sum() + (logps * torch.tensor([1.0, -3.0, 0.5, 2.0])).sum()).backward()
    expected = 2.0 + plain_gradient(torch.float32)
    expected[1] += 2.0
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-5, atol=1e-5)
    assert weight.grad is None and weight.grad_added_to_main_grad and not weight.zero_out_wgrad


def test_buffer_of_another_type_is_left_to_megatron_core() -> None:
    weight = weight_with_buffer(torch.bfloat16, buffer_dtype=torch.bfloat16)
    backward(weight)
    assert torch.equal(weight.main_grad, torch.full((PADDED, HIDDEN), 2.0, dtype=torch.bfloat16))
    assert not weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.grad.float(), plain_gradient(torch.bfloat16), rtol=1e-2, atol=1e-2)


def test_weight_that_is_not_trained() -> None:
    weight = weight_with_buffer(torch.float32).requires_grad_(False)
    backward(weight)
    assert weight.grad is None and torch.equal(weight.main_grad, torch.full((PADDED, HIDDEN), 2.0))
