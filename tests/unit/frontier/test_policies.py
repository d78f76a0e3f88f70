"""The two policies of the sweep, against other ways to compute the same."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from frontier.bigram import LENGTH, NO_WORD, BigramPolicy, BigramWorld, Texts, draw, kl_of, log_bigrams, log_probs_of
from frontier.reviews import BEGIN, END, UNKNOWN, Reviews, load_reviews
from frontier.sweep import Groups, Run, train
from frontier.transformer import NEW, PROMPT, TEMPERATURE, BiasPolicy, Samples, TransformerWorld, fine_tune, make_model
from quickstart.oracle import Oracle
from torch.nn.functional import log_softmax


def small_reviews() -> Reviews:
    """Six words and a handful of texts."""
    words = ("</s>", "<unk>", "<s>", "a", "good", "bad", "film", "is", "not")
    texts = ((3, 6, 7, 4), (3, 6, 7, 5), (6, 7, 8, 4, 3, 3, 5), (7, 8, 5))
    return Reviews(words, texts, Oracle({"good": 1.5, "bad": -2.0, "not good": -3.0}, 0.25), "here")


@pytest.fixture(scope="module")
def world() -> BigramWorld:
    return BigramWorld.of(load_reviews(None), seed=0)


def test_reward_is_twice_the_distance_of_the_log_odds_from_zero() -> None:
    reviews = small_reviews()
    assert reviews.reward([3, 4, END]) == 2 * (0.25 + 1.5)
    assert reviews.reward([8, 4, END]) == 2 * abs(0.25 + 1.5 - 3.0)
    assert reviews.reward([UNKNOWN, 5, NO_WORD, NO_WORD]) == 2 * abs(0.25 - 2.0)


def test_bigrams_by_hand() -> None:
    """After "is" (7) come good, bad and twice not; SMOOTHING draws from the unigrams are added."""
    table = log_bigrams(small_reviews()).exp()
    assert table.sum(dim=1) == pytest.approx(torch.ones(9).numpy())
    # Words that follow another word: film 2, is 3, good 2, bad 3, not 2, a 2, end 4; 18 in all.
    unigrams = torch.tensor([4, 0, 0, 2, 2, 3, 2, 3, 2], dtype=torch.float64) / 18
    counts = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 2], dtype=torch.float64)
    weights = ((counts + 5 * unigrams) / 9) ** (1 / 0.8)
    assert table[7].numpy() == pytest.approx((weights / weights.sum()).numpy(), abs=1e-9)
    assert table[:, [UNKNOWN, BEGIN]].max() < 1e-12


def test_drawn_texts_follow_the_table() -> None:
    table = log_bigrams(small_reviews())
    texts = draw(table, torch.full((20_000,), 7), seed=3)
    first = torch.bincount(texts.words[:, 0], minlength=9) / 20_000
    probabilities = table[7].exp()
    errors = (probabilities * (1 - probabilities) / 20_000).sqrt()
    assert ((first - probabilities).abs() <= 4 * errors + 1e-9).all()
    ended = texts.words == END
    assert (texts.words[ended.cumsum(dim=1) - ended.long() > 0] == NO_WORD).all()


def test_log_probs_word_by_word() -> None:
    table = log_bigrams(small_reviews())
    texts = draw(table, torch.tensor([7, 3, 6]), seed=1)
    for prompt, words, found in zip(
        texts.prompts.tolist(), texts.words.tolist(), log_probs_of(table, texts), strict=True
    ):
        drawn = [word for word in words if word != NO_WORD]
        expected = sum(table[last, word].item() for last, word in zip([prompt, *drawn], drawn, strict=False))
        assert found.item() == pytest.approx(expected, abs=1e-12)


def test_kl_is_the_mean_of_log_ratios(world: BigramWorld) -> None:
    """Both estimate the KL of whole texts; the one over states has the smaller error."""
    policy = BigramPolicy(world.reference, rank=4, seed=1)
    with torch.no_grad():
        policy.tilt += 0.3 * torch.randn(len(policy.tilt), generator=torch.Generator().manual_seed(0))
        policy.second += 0.3 * torch.randn(policy.second.shape, generator=torch.Generator().manual_seed(1))
        moved = policy()
    texts = draw(moved, world.test_prompts, seed=5)
    ratios = log_probs_of(moved, texts) - log_probs_of(world.reference, texts)
    exact = kl_of(moved, world.reference, texts)
    difference = ratios - exact
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))
    assert exact.std() < ratios.std() and exact.mean() > 0.3
    assert kl_of(world.reference, world.reference, texts).abs().max() < 1e-12


def test_a_bigram_policy_begins_as_the_reference(world: BigramWorld) -> None:
    policy = BigramPolicy(world.reference, rank=4, seed=1)
    chosen = torch.tensor([5, 3000, 17])
    (found,) = world.logps([policy], chosen, 8)
    assert found.detach().numpy() == pytest.approx(world.groups.reference_logps[chosen, :8].numpy(), abs=1e-4)
    assert [each.shape[1:] for each in policy.trained()] == [(), (4,), (4,)]
    assert len(BigramPolicy(world.reference, rank=0, seed=1).trained()) == 1


def test_candidates_of_a_group_share_its_prompt(world: BigramWorld) -> None:
    texts: Texts = world.candidates
    assert texts.words.shape == (len(world.groups.rewards) * 32, LENGTH)
    assert (texts.prompts.view(-1, 32) == texts.prompts.view(-1, 32)[:, :1]).all()
    row = 17 * 32 + 5
    assert world.groups.rewards[17, 5] == world.reviews.reward([texts.prompts[row].item(), *texts.words[row].tolist()])


@pytest.fixture(scope="module")
def drawn() -> tuple[BiasPolicy, Samples]:
    """Texts of a briefly trained model with a bias."""
    reviews = small_reviews()
    model = make_model(len(reviews.words), seed=1)
    fine_tune(model, Reviews(reviews.words, reviews.texts * 64, reviews.oracle, "here"), epochs=2, seed=0)
    policy = BiasPolicy(model)
    with torch.no_grad():
        policy.bias += torch.linspace(-1, 1, len(policy.bias))
    prompts = torch.tensor([[BEGIN, 3, 6], [BEGIN, 6, 7], [BEGIN, 7, 8]]).repeat_interleave(4, dim=0)
    return policy, policy.draw(prompts, seed=2)


def table_of(policy: BiasPolicy, samples: Samples, bias: torch.Tensor) -> torch.Tensor:
    """log pi of every next token by a plain forward pass of the model, without a cache, [N, NEW, V]."""
    ids = torch.cat([samples.prompts, samples.words], dim=1)
    hidden = policy.body(input_ids=ids).last_hidden_state[:, PROMPT - 1 : -1]
    logits = hidden @ policy.body.embed_tokens.weight.T + bias
    return log_softmax(logits / TEMPERATURE + policy.never, dim=-1)


def test_log_probs_and_kl_of_the_transformer(drawn: tuple[BiasPolicy, Samples]) -> None:
    policy, samples = drawn
    with torch.no_grad():
        table = table_of(policy, samples, policy.bias)
        reference = table_of(policy, samples, torch.zeros_like(policy.bias))
    present = torch.arange(NEW) < samples.lengths[:, None]
    tokens = table.gather(2, samples.words[..., None])[..., 0]
    assert samples.logps.numpy() == pytest.approx((tokens * present).sum(dim=1).double().numpy(), abs=1e-4)
    kl = (table.exp() * (table - reference)).sum(dim=-1)
    assert samples.kls.numpy() == pytest.approx((kl * present).sum(dim=1).double().numpy(), abs=1e-4)
    assert samples.kls.min() > 0.01
    last = samples.words[torch.arange(len(samples.words)), samples.lengths - 1]
    assert ((last == END) | (samples.lengths == NEW)).all()
    assert (samples.words[~present] == END).all()


def test_test_prompts_are_held_out() -> None:
    """On a corpus with few openings as well."""
    reviews = load_reviews(None)
    few = Reviews(reviews.words, reviews.texts[:400], reviews.oracle, "here")
    model = make_model(len(few.words), seed=0)
    with mock.patch.multiple("frontier.transformer", TRAIN_PROMPTS=20, MOST_CANDIDATES=2):
        world = TransformerWorld.of(few, model, seed=0)
    train, test = (
        {tuple(line) for line in prompts.tolist()} for prompts in (world.candidates.prompts, world.test_prompts)
    )
    assert train and test and not train & test
    assert len(world.test_prompts) == 640 and world.groups.rewards.shape == (20, 2)
    means = world.evaluate(BiasPolicy(model))
    assert means.kls.max() == 0.0 and len(means.rewards) == 640


def test_training_sees_the_log_probs_of_the_whole_model() -> None:
    """Candidates of the model without a bias, under two policies with one; 3 groups of 32."""
    reviews = small_reviews()
    model = make_model(len(reviews.words), seed=1)
    prompts = torch.tensor([[BEGIN, 3, 6], [BEGIN, 6, 7], [BEGIN, 7, 8]]).repeat_interleave(32, dim=0)
    samples = BiasPolicy(model).draw(prompts, seed=2)
    groups = Groups(torch.zeros(3, 32, dtype=torch.float64), samples.logps.view(3, 32))
    world = TransformerWorld(reviews, model, samples, groups, prompts)
    policies = [BiasPolicy(model), BiasPolicy(model)]
    assert [name for name, each in policies[0].named_parameters() if each.requires_grad] == ["bias"]
    with torch.no_grad():
        policies[0].bias += torch.linspace(-1, 1, len(policies[0].bias))
        policies[1].bias += torch.linspace(0, 1, len(policies[1].bias)).square()
    found = world.logps(policies, torch.tensor([2, 0]), 5)
    for policy, logps in zip(policies, found, strict=True):
        table = table_of(policy, samples, policy.bias)
        tokens = table.gather(2, samples.words[..., None])[..., 0] * (torch.arange(NEW) < samples.lengths[:, None])
        expected = tokens.sum(dim=1).view(3, 32)[[2, 0], :5]
        assert logps.detach().numpy() == pytest.approx(expected.detach().double().numpy(), abs=1e-4)
        (gradient,) = torch.autograd.grad(logps.sum(), policy.bias, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected.sum(), policy.bias)
        assert gradient.numpy() == pytest.approx(wanted.numpy(), abs=1e-3)


def test_runs_side_by_side_end_as_alone(world: BigramWorld) -> None:
    runs = [Run("bigram", 4, 8, method, 0.5, 1.0, lr, 3, 4, 0) for method, lr in (("exo_rw", 0.03), ("dpo_rw", 0.1))]
    for policy, run in zip(train(world, runs), runs, strict=True):
        (alone,) = train(world, [run])
        for together, single in zip(policy.trained(), alone.trained(), strict=True):
            assert torch.equal(together, single)
    with pytest.raises(ValueError, match="too many values"):
        train(world, [runs[0], replace(runs[1], seed=1)])
