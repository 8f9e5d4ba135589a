"""The paper's formulas and theorems in float64: finite differences, signs of ρ, equalities, bounds, a separator."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from trainers.errors import SpecError
from trainers.theory import dynamics, representations, theorems

WIDTH, VOCABULARY, BETA = 6, 9, 0.3


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def response(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return draw(length, WIDTH, seed=seed), torch.randint(0, VOCABULARY, (length,), generator=generator)


def pull(chosen_reward, rejected_reward):
    """By how much a pair pulls: g = σ(r⁻ − r⁺)."""
    return float(torch.sigmoid(rejected_reward - chosen_reward).detach())


def log_prob(unembedding, hidden, target):
    return torch.log_softmax(hidden @ unembedding.T, 1).gather(1, target[:, None]).sum()


def implicit_ratio(seed, step_size):
    """Measured over predicted change of an unseen response's reward, one gradient step on a pair."""
    before = draw(VOCABULARY, WIDTH, seed=seed)
    unseen, chosen, rejected = response(4, seed + 1), response(3, seed + 2), response(5, seed + 3)
    reference = draw(2, seed=seed + 4)
    weights = before.clone().requires_grad_()
    chosen_reward, rejected_reward = (
        BETA * (log_prob(weights, *found) - reference[place])
        for place, found in enumerate((chosen, rejected))
    )
    (gradient,) = torch.autograd.grad(-logsigmoid(chosen_reward - rejected_reward), weights)
    after = before - step_size * gradient
    measured = BETA * float(log_prob(after, *unseen) - log_prob(before, *unseen))
    tokens = [dynamics.tokens_of(before, *found) for found in (unseen, chosen, rejected)]
    weight = pull(chosen_reward, rejected_reward)
    predicted = dynamics.implicit_change(*tokens, beta=BETA, weight=weight, step_size=step_size)
    return measured / float(predicted.sum())


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_finite_differences_of_im_rm_tend_to_the_formula_linearly_in_the_step(seed):
    errors = [implicit_ratio(seed, 1e-3 / 2**halving) - 1 for halving in range(4)]
    assert abs(errors[0]) < 0.05
    for error, half in itertools.pairwise(errors):
        assert error / half == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("step_size", [1e-6, 0.1, 10.0])
def test_the_change_of_ex_rm_is_exact_at_every_step_size(step_size):
    head = draw(WIDTH, seed=1).requires_grad_()
    unseen, chosen, rejected = (draw(WIDTH, seed=seed) for seed in (2, 3, 4))
    (gradient,) = torch.autograd.grad(-logsigmoid(head @ (chosen - rejected)), head)
    measured = float(-step_size * gradient @ unseen)
    weight = pull(head @ chosen, head @ rejected)
    predicted = dynamics.explicit_change(unseen, chosen, rejected, weight=weight, step_size=step_size)
    assert measured == pytest.approx(float(predicted), rel=1e-12)


@given(seed=st.integers(0, 2**20), scale=st.floats(0.01, 20))
def test_rho_is_not_negative_for_equal_tokens_and_at_most_one_for_different_ones(seed, scale):
    unembedding = scale * draw(VOCABULARY, WIDTH, seed=seed)
    left = dynamics.tokens_of(unembedding, *response(6, seed + 1))
    right = dynamics.tokens_of(unembedding, *response(7, seed + 2))
    found = dynamics.rho(left, right)
    equal = left.target_K[:, None] == right.target_K[None, :]
    assert float(found.abs().max()) <= 2 + 1e-12
    assert (found[equal] >= -1e-12).all()
    assert (found[~equal] <= 1 + 1e-12).all()


def test_the_part_of_token_matches_and_the_rest_are_told_apart():
    unembedding = draw(VOCABULARY, WIDTH, seed=0)
    hidden = draw(1, WIDTH, seed=1)
    same, other = (dynamics.tokens_of(unembedding, hidden, torch.tensor([token])) for token in (3, 4))
    matches, others = dynamics.implicit_change(
        same, same, other, beta=1.0, weight=1.0, step_size=1.0
    ).tolist()
    square = float(hidden[0] @ hidden[0])
    assert matches == pytest.approx(square * float(dynamics.rho(same, same)))
    assert others == pytest.approx(-square * float(dynamics.rho(same, other)))
    assert matches > 0


def test_theorem_1s_witness_separates_by_the_margin_and_stays_below_the_bound():
    masses = {math.exp(log_mass): log_mass for log_mass in (-40.0, -5.0, -0.01)}
    found = theorems.theorem_1([0.01, 0.1, 1.0], [0.001, 0.1, 2.0], [*masses], responses=50, correct=5)
    assert len(found) == 27
    for row in found:
        assert row["margin"] == pytest.approx(row["delta"], rel=1e-6)
        assert row["log_reference_correct"] == pytest.approx(masses[row["mass"]])
        assert row["log_correct"] <= row["log_bound"]
        # π(C) = e^{δ/β} p / (1 − p + e^{δ/β} p).
        tilted, rest = row["delta"] / row["beta"] + masses[row["mass"]], math.log1p(-row["mass"])
        normaliser = torch.logaddexp(torch.tensor(tilted), torch.tensor(rest))
        assert row["log_correct"] == pytest.approx(tilted - float(normaliser), abs=1e-4)


@pytest.fixture(scope="module")
def world():
    return theorems.single_token_world(pairs=12, width=8, noise=0.6, seed=5)


def test_theorem_2_an_im_rm_learns_nothing_of_tokens_that_it_has_not_seen(world):
    difference, loss = theorems.descend_implicit(*world, beta=0.5, steps=200, step_size=5.0, seed=0)
    assert loss < 0.1
    assert (difference == 0).all()
    difference, _ = theorems.descend_implicit(world[0], world[0], beta=0.5, steps=100, step_size=5.0, seed=0)
    assert (difference > 0).all()


def test_theorem_2_an_ex_rm_head_turns_towards_the_max_margin_separator(world):
    seen, unseen = world
    best = representations.separator(seen.difference_PD)
    (early, _), (head, log_loss) = (
        theorems.descend_explicit(seen.difference_PD, steps=steps) for steps in (100, 1500)
    )
    assert early @ best / early.norm() < head @ best / head.norm()
    assert head @ best / head.norm() > 0.999
    assert log_loss < -100
    right = unseen.difference_PD @ best > 0.05 * unseen.difference_PD.norm(dim=1)
    assert right.sum() > 6
    assert (unseen.difference_PD[right] @ head > 0).all()


def test_the_separator_is_the_one_with_the_largest_margin():
    # Margins are 1 along (1, 0) whatever the second coordinate; (1, 0) is best.
    differences = torch.tensor([[1.0, 5.0], [1.0, -5.0], [3.0, 1.0]], dtype=torch.float64)
    assert representations.separator(differences).tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    with pytest.raises(SpecError, match="no direction separates"):
        representations.separator(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64))


def test_statistics_are_the_footnotes():
    found = representations.statistics(torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0]))
    assert found == {
        "mean": 1.0,
        "min": -1.0,
        "first_quartile": 0.0,
        "median": 1.0,
        "third_quartile": 2.0,
        "max": 3.0,
        "share_positive": 0.6,
        "n": 5.0,
    }


def test_inner_products_are_of_every_two_and_cosines_of_each():
    seen = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # The second pair has the same response twice.
    unseen = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert representations.inner_products(seen, unseen).tolist() == [3.0, 0.0, 8.0, 0.0]
    assert representations.cosines(torch.tensor([2.0, 0.0]), unseen).tolist() == pytest.approx([0.6, 0.0])
