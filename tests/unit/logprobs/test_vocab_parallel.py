"""Log-probs on one vocabulary shard against torch.log_softmax on whole logits (several shards: tests/multiprocess)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from exo_megatron.logprobs.softmax import Projection, Tiling, VocabShard
from exo_megatron.logprobs.vocab_parallel import sharded_logprobs

VOCAB, PADDED, HIDDEN = 11, 16, 6
TEMPERATURE = 0.8
SHARD = VocabShard(group=None, rank=0, ranks=1, vocab_size=VOCAB)
# Three first tokens on row 0, two of them the same token; rows 1 and 4 predict one each; row 2 predicts two.
TOKEN_PREDICTOR = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
TOKEN_TARGET = torch.tensor([3, 10, 3, 0, 7, 1, 10, 5])
ROWS = 5
# Widths around those at which targets lie on the border of a tile; no, some and all tiles kept.
TILINGS = [
    Tiling(columns, kept, rows)
    for columns in (1, 3, 4, 7, 10, 11, 100)
    for kept in (0, 1, 5, 100)
    for rows in (None, 2)
]
# The tokens of row 0 have coefficients as an objective gives them (their sum is 0), row 2's do not.
UPSTREAM = torch.tensor([1.5, -2.0, 0.5, 0.0, 3.0, -1.0, 2.0, -0.7], dtype=torch.float64)


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
    return torch.log_softmax(logits[TOKEN_PREDICTOR], dim=-1).gather(-1, TOKEN_TARGET[:, None])[:, 0]


def actual(hidden: Tensor, weight: Tensor, tiling: Tiling, softcap: float | None = None) -> Tensor:
    return sharded_logprobs(
        hidden,
        weight,
        TOKEN_PREDICTOR,
        TOKEN_TARGET,
        SHARD,
        temperature=TEMPERATURE,
        tiling=tiling,
        softcap=softcap,
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_values_and_gradients(tiling: Tiling, softcap: float | None) -> None:
    hidden, weight = inputs()
    other_hidden, other_weight = inputs()
    ours, theirs = actual(hidden, weight, tiling, softcap), expected(other_hidden, other_weight, softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    ours.backward(UPSTREAM)
    theirs.backward(UPSTREAM)
    torch.testing.assert_close(hidden.grad, other_hidden.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weight.grad, other_weight.grad, rtol=1e-12, atol=1e-13)
    assert not weight.grad[VOCAB:].any()


def test_finite_differences() -> None:
    """Each runs the backward of one graph several times."""
    for kept in (0, 1, 100):
        assert torch.autograd.gradcheck(lambda h, w, kept=kept: actual(h, w, Tiling(4, kept)), inputs())
        assert torch.autograd.gradcheck(lambda h, w, kept=kept: actual(h, w, Tiling(4, kept), 1.5), inputs())


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
        tiling=Tiling(8, 1),
    )
    torch.testing.assert_close(logps.exp(), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("tiling", [Tiling(2, 0), Tiling(100, 1)], ids=str)
def test_bf16_inputs_are_computed_in_fp32(tiling: Tiling) -> None:
    """The same as casting to fp32 first: no product, softmax or sum in bf16. Gradients come back in bf16."""
    hidden, weight = inputs(torch.bfloat16)
    logps = actual(hidden, weight, tiling)
    assert logps.dtype == torch.float32
    wide_hidden, wide_weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    theirs = expected(wide_hidden, wide_weight)
    torch.testing.assert_close(logps, theirs, rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    theirs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad, wide_hidden.grad.bfloat16(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(weight.grad, wide_weight.grad.bfloat16(), rtol=1e-2, atol=1e-3)


def gradients(logps: Tensor, *inputs: Tensor, upstream: Tensor = UPSTREAM) -> tuple[Tensor, ...]:
    return torch.autograd.grad(logps, inputs, upstream.to(logps.dtype))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("kept", [0, 100])
def test_fp32_logits_of_any_size(kept: int, scale: float) -> None:
    """Up to the rounding of the logits themselves (at 1e4 that decides every softmax), with float64 as the judge."""
    hidden, weight = (tensor.detach() for tensor in inputs(torch.float32))
    hidden, weight = (hidden * scale).requires_grad_(), weight.round().requires_grad_()
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    ours, theirs = actual(hidden, weight, Tiling(4, kept)), expected(*wide)
    rounding = 1e-6 * max(scale, 1.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=10 * rounding)
    for got, wanted in zip(gradients(ours, hidden, weight), gradients(theirs, *wide), strict=True):
        assert got.isfinite().all()
        assert (got - wanted).abs().max() <= 10 * rounding * wanted.abs().max()


@pytest.mark.parametrize("kept", [0, 100])
def test_a_target_that_is_almost_certain(kept: int) -> None:
    """p = 1 - 1.1e-5 at a width where p and the others share a tile, and where they do not: 1 - p keeps its digits."""
    for columns in (2, 100):
        hidden = torch.tensor([[12.0]], requires_grad=True)
        weight = torch.tensor([[0.0], [1.0], [0.02], [-0.3]], requires_grad=True)
        wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        row, target, shard = torch.tensor([0]), torch.tensor([1]), VocabShard(None, 0, 1, 4)
        ours = sharded_logprobs(hidden, weight, row, target, shard, temperature=1.0, tiling=Tiling(columns, kept))
        theirs = torch.log_softmax(wide[0] @ wide[1].t(), dim=-1)[:, 1]
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=0.0)
        one = torch.ones(1)
        for got, wanted in zip(
            gradients(ours, hidden, weight, upstream=one), gradients(theirs, *wide, upstream=one), strict=True
        ):
            torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("kept", [0, 100])
def test_a_target_that_is_almost_impossible(kept: int) -> None:
    """Its tile's probabilities are all below the smallest fp32: the gradient is that of the target's logit alone."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [-1.0], [500.0], [2.0]], requires_grad=True)
    row, target, shard = torch.tensor([0]), torch.tensor([1]), VocabShard(None, 0, 1, 4)
    logps = sharded_logprobs(hidden, weight, row, target, shard, temperature=1.0, tiling=Tiling(2, kept))
    assert logps.tolist() == [-501.0]
    logps.sum().backward()
    assert hidden.grad.tolist() == [[-501.0]]
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor([0.0, 1.0, -1.0, 0.0]))


@pytest.mark.parametrize("kept", [0, 1, 100])
def test_callers_tensors_are_not_modified(kept: int) -> None:
    hidden, weight = inputs()
    upstream = UPSTREAM.clone()
    tensors = (hidden, weight, upstream, TOKEN_PREDICTOR, TOKEN_TARGET)
    copies = [tensor.detach().clone() for tensor in tensors]
    actual(hidden, weight, Tiling(4, kept)).backward(upstream)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("kept", [0, 100])
def test_no_rows(kept: int) -> None:
    """The padding-only micro-batch of a rank without groups: nothing to predict, zero gradients."""
    _, weight = inputs()
    hidden = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    logps = sharded_logprobs(hidden, weight, empty, empty, SHARD, temperature=1.0, tiling=Tiling(4, kept))
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


def largest_result(rows: int, vocab: int, tiling: Tiling) -> int:
    hidden = torch.randn(rows, 2, requires_grad=True)
    weight = torch.randn(vocab, 2, requires_grad=True)
    shard = VocabShard(group=None, rank=0, ranks=1, vocab_size=vocab)
    targets = torch.arange(rows)
    with LargestResult() as seen:
        logps = sharded_logprobs(hidden, weight, targets, targets, shard, temperature=1.0, tiling=tiling)
        logps.sum().backward()
    return seen.largest


@pytest.mark.parametrize("kept", [0, 3, 100])
def test_no_tensor_is_larger_than_a_tile(kept: int) -> None:
    assert largest_result(256, 512, Tiling(32, kept)) == 256 * 32


def saved_logits(kept: int) -> int:
    """Bytes of logits [256, 512] that the forward pass leaves to the backward, in tiles of 64 columns."""
    hidden = torch.randn(256, 2, requires_grad=True)
    weight = torch.randn(512, 2, requires_grad=True)
    targets = torch.arange(256)
    shard = VocabShard(group=None, rank=0, ranks=1, vocab_size=512)
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes if tensor.shape[1:] == (64,) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sharded_logprobs(hidden, weight, targets, targets, shard, temperature=1.0, tiling=Tiling(64, kept))
    return saved


def test_as_many_tiles_stay_as_are_kept() -> None:
    assert [saved_logits(kept) for kept in (0, 3, 100)] == [0, 3 * 256 * 64 * 4, 256 * 512 * 4]


@pytest.mark.parametrize("trained", [True, False])
def test_without_a_backward_nothing_is_kept(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the end of the forward pass: tiles to keep would become factors of the backward's products."""
    monkeypatch.delattr(Projection, "factor")
    hidden, weight = (tensor.detach().requires_grad_(trained) for tensor in inputs())
    with torch.set_grad_enabled(not trained):
        assert actual(hidden, weight, Tiling(4, 100)).shape == TOKEN_PREDICTOR.shape
