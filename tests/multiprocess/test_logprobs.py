"""Log-probs and their gradients on vocabulary shards against float64 autograd of the straightforward formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.multiprocess.harness import Check, Outcome, run_checks
from tests.multiprocess.logprob_checks import Case

# 16 padded rows of 11 words. 2 ranks: 8 and 3 words. 4 ranks: 4, 4, 3 and none.
VOCAB, PADDED, HIDDEN = 11, 16, 6
# Row 0 predicts the first tokens of three candidates, two of them the same; their coefficients sum to 0 as an
# objective's do. Targets lie on the borders of shards (3|4, 7|8) and at the end of the vocabulary.
TOKEN_PREDICTOR = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 6])
TOKEN_TARGET = torch.tensor([3, 10, 3, 0, 7, 8, 10, 4, 8, 7])
UPSTREAM = torch.tensor([1.5, -2.0, 0.5, 0.7, 3.0, -1.0, 2.0, 0.0, 1.0, -0.3], dtype=torch.float64)
TILINGS = [(3, 0), (3, 1), (100, 100)]


def plain() -> Case:
    """Padding rows are large: unmasked, they would win every softmax."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    weight[VOCAB:] = hidden.sum(0) * 10
    return Case(hidden, weight, TOKEN_PREDICTOR, TOKEN_TARGET, UPSTREAM, VOCAB, temperature=0.8)


def far_apart() -> Case:
    """fp32; the words of the second half are e^300 times as likely; some targets are in the first."""
    case = plain()
    hidden, weight = case.hidden.clone(), case.weight.clone()
    hidden[:, 0], weight[8:, 0] = 300.0, 0.8
    weight[:8, 0] = 0.0
    return replace(case, hidden=hidden.float(), weight=weight.float())


CASES = {
    "plain": plain(),
    "capped": replace(plain(), softcap=1.5),
    "fp32": replace(plain(), hidden=plain().hidden.float(), weight=plain().weight.float()),
    "far apart": far_apart(),
    "empty": replace(
        plain(),
        hidden=torch.zeros(0, HIDDEN, dtype=torch.float64),
        token_predictor=TOKEN_PREDICTOR[:0],
        token_target=TOKEN_TARGET[:0],
        upstream=UPSTREAM[:0],
    ),
}


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (tensor.detach().clone().double().requires_grad_() for tensor in (case.hidden, case.weight))
    logits = hidden @ weight[:VOCAB].t()
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logps = torch.log_softmax(logits / case.temperature, dim=-1)[case.token_predictor, case.token_target]
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), case.upstream)


def name(case: str, tiling: tuple[int, int]) -> str:
    return f"{case} {tiling[0]} {tiling[1]}"


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    function = "tests.multiprocess.logprob_checks:logprobs_and_gradients"
    checks = [
        Check(name(key, tiling), function, {"case": case, "tiling": tiling})
        for key, case in CASES.items()
        for tiling in TILINGS
    ]
    yield run_checks(request.param, checks, tmp_path_factory.mktemp("logprobs"))


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(outcomes: dict[str, Outcome], case: str, tiling: tuple[int, int]) -> None:
    ranks = outcomes[name(case, tiling)].values()
    logps, d_hidden, d_weight = expected(CASES[case])
    narrow = CASES[case].hidden.dtype == torch.float32
    close = (
        {"rtol": 1e-5, "atol": 1e-5 * (300 if case == "far apart" else 1)} if narrow else {"rtol": 1e-12, "atol": 1e-13}
    )
    assert all(torch.equal(rank[0], ranks[0][0]) for rank in ranks)
    torch.testing.assert_close(ranks[0][0].double(), logps, **close)
    torch.testing.assert_close(sum(rank[1].double() for rank in ranks), d_hidden, **close)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]).double(), d_weight, **close)
    assert all(rank[3] for rank in ranks)
