"""Log-probs on one vocabulary shard against torch.log_softmax on whole logits (several shards: tests/multiprocess)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from exo_megatron.logprobs.vocab_parallel import VocabShard, sharded_logprobs

VOCAB, PADDED, HIDDEN = 11, 16, 6
TEMPERATURE = 0.8
SHARD = VocabShard(group=None, rank=0, ranks=1, vocab_size=VOCAB)
# Three first tokens on row 0, two of them the same token; rows 1 and 4 predict one each; row 2 predicts two.
TOKEN_ROW = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
TOKEN_TARGET = torch.tensor([3, 10, 3, 0, 7, 1, 10, 5])
ROWS = 5
CHUNKS = [1, 2, 3, 4, 5, 100]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """hidden [M, H] and weight [Vp, H] whose padding rows are large: unmasked, they would win every softmax."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    weight[VOCAB:] = hidden.sum(0) * 10
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def expected(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    logits = hidden @ weight[:VOCAB].t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / TEMPERATURE
    return torch.log_softmax(logits[TOKEN_ROW], dim=-1).gather(-1, TOKEN_TARGET[:, None])[:, 0]


def actual(hidden: Tensor, weight: Tensor, chunk_rows: int, softcap: float | None = None) -> Tensor:
    return sharded_logprobs(
        hidden,
        weight,
        TOKEN_ROW,
        TOKEN_TARGET,
        SHARD,
        temperature=TEMPERATURE,
        chunk_rows=chunk_rows,
        softcap=softcap,
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_values_and_gradients(chunk_rows: int, softcap: float | None) -> None:
    hidden, weight = inputs()
    other_hidden, other_weight = inputs()
    upstream = torch.linspace(-1.0, 2.0, len(TOKEN_ROW), dtype=torch.float64)
    ours, theirs = actual(hidden, weight, chunk_rows, softcap), expected(other_hidden, other_weight, softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    ours.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(hidden.grad, other_hidden.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weight.grad, other_weight.grad, rtol=1e-12, atol=1e-13)
    assert not weight.grad[VOCAB:].any()


def test_finite_differences() -> None:
    hidden, weight = inputs()
    assert torch.autograd.gradcheck(lambda h, w: actual(h, w, 2), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: actual(h, w, 2, 1.5), (hidden, weight))


def test_by_hand() -> None:
    """Two words with logits 0.8 ln 3 and 0: divided by tau = 0.8 they are ln 3 and 0, probabilities 3/4 and 1/4."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.8 * torch.log(torch.tensor(3.0)).item()], [0.0], [50.0]])
    logps = sharded_logprobs(
        hidden,
        weight,
        torch.tensor([0, 0]),
        torch.tensor([0, 1]),
        VocabShard(group=None, rank=0, ranks=1, vocab_size=2),
        temperature=0.8,
        chunk_rows=8,
    )
    torch.testing.assert_close(logps.exp(), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_bf16_inputs_are_computed_in_fp32(chunk_rows: int) -> None:
    """The same as casting to fp32 first: no product, softmax or sum in bf16. Gradients come back in bf16."""
    hidden, weight = inputs(torch.bfloat16)
    logps = actual(hidden, weight, chunk_rows)
    assert logps.dtype == torch.float32
    wide_hidden, wide_weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    theirs = expected(wide_hidden, wide_weight)
    torch.testing.assert_close(logps, theirs, rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    theirs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad, wide_hidden.grad.bfloat16(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(weight.grad, wide_weight.grad.bfloat16(), rtol=1e-2, atol=1e-3)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = inputs(torch.float32)
    with torch.no_grad():
        hidden.mul_(1e3)
    ours = actual(hidden, weight, 2)
    ours.sum().backward()
    assert ours.isfinite().all() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_callers_tensors_are_not_modified() -> None:
    hidden, weight = inputs()
    upstream = torch.linspace(-1.0, 2.0, len(TOKEN_ROW), dtype=torch.float64)
    tensors = (hidden, weight, upstream, TOKEN_ROW, TOKEN_TARGET)
    copies = [tensor.detach().clone() for tensor in tensors]
    actual(hidden, weight, 2).backward(upstream)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_no_rows() -> None:
    """The padding-only row of a rank without groups: nothing to predict, zero gradients."""
    _, weight = inputs()
    hidden = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    logps = sharded_logprobs(hidden, weight, empty, empty, SHARD, temperature=1.0, chunk_rows=4)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, HIDDEN) and not weight.grad.any()


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_logits_of_more_than_a_chunk_never_exist() -> None:
    rows, vocab, hidden_size, chunk = 256, 512, 2, 16
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    shard = VocabShard(group=None, rank=0, ranks=1, vocab_size=vocab)
    targets = torch.arange(rows)
    with LargestResult() as seen:
        logps = sharded_logprobs(hidden, weight, targets, targets, shard, temperature=1.0, chunk_rows=chunk)
        logps.sum().backward()
    assert chunk * vocab <= seen.largest < 2 * chunk * vocab
