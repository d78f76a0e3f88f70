"""Sums of token log-probs over each candidate of a micro-batch."""

from __future__ import annotations

import torch

from exo_megatron.logprobs.vocab_parallel import sequence_logprobs
from exo_megatron.models.layouts.groups import build_layout

PROMPTS = [[1, 2, 3], [4]]
CANDIDATES = [[[5, 6], [7]], [[8], [9, 10, 11], [12]]]


def test_sums_and_their_gradient() -> None:
    """Token n of the layout carries -(n + 1). By the layout test, tokens 0 and 2 are y_1 of the first group, token 1
    is its y_2; tokens 3, 4, 5 start the candidates of the second group, 6 and 7 continue its second one.
    """
    layout = build_layout(PROMPTS, CANDIDATES, multiple=4)
    token_logps = (-torch.arange(1.0, 9.0)).requires_grad_()
    sums = sequence_logprobs(token_logps, layout)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [-1.0 - 3.0, -2.0, -4.0, -5.0 - 7.0 - 8.0, -6.0]
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    (sums * weights).sum().backward()
    assert token_logps.grad.tolist() == [1.0, 10.0, 1.0, 100.0, 1000.0, 10000.0, 1000.0, 1000.0]


def test_long_candidates_lose_nothing_to_rounding() -> None:
    """2000 tokens, sums near -8000: fp32 running sums would be off by several thousandths."""
    generator = torch.Generator().manual_seed(0)
    layout = build_layout([[1]] * 3, [[[2] * 2000, [3]], [[4] * 2000, [5]], [[6] * 2000, [7]]])
    token_logps = -8.0 * torch.rand(layout.token_predictor.shape[0], generator=generator)
    exact = torch.zeros(6, dtype=torch.float64).index_add_(0, layout.token_candidate, token_logps.double())
    torch.testing.assert_close(sequence_logprobs(token_logps, layout), exact, rtol=1e-13, atol=0.0)


def test_a_candidates_sum_does_not_depend_on_the_rest_of_the_micro_batch() -> None:
    """Bit for bit: alone, and as the last candidate behind others."""
    generator = torch.Generator().manual_seed(1)
    candidate = -torch.rand(37, generator=generator)
    alone = build_layout([[1, 2]], [[[5] * 37]])
    packed = build_layout([[1, 2], [3]], [[[5] * 11, [6] * 3], [[7] * 5, [5] * 37]])
    token_logps = -8.0 * torch.rand(packed.token_predictor.shape[0], generator=generator)
    # In natural order the candidate is the last 37 tokens.
    token_logps[torch.argsort(packed.token_order)[-37:]] = candidate
    natural_order = torch.argsort(alone.token_order)
    assert natural_order.tolist() == list(range(37))
    assert torch.equal(sequence_logprobs(candidate, alone)[0], sequence_logprobs(token_logps, packed)[-1])


def test_row_without_candidates() -> None:
    layout = build_layout([], [], multiple=2)
    token_logps = torch.zeros(0, requires_grad=True)
    sums = sequence_logprobs(token_logps, layout)
    assert sums.shape == (0,) and sums.dtype == torch.float64
    sums.sum().backward()
