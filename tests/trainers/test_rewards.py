"""Rewards against the naive two forward passes, and saved models against the module that was trained."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers import zero_rank
from tests.trainers.test_zero import naive_log_prob
from trainers import metrics
from trainers.evaluate import score_pairs
from trainers.models import initialise_head, load_model, load_tokenizer, save_model
from trainers.pairs import collate
from trainers.reference import compute_reference, read_reference, write_reference
from trainers.rewards import log_prob_sums, reward_module
from trainers.specs import RewardSpec

IM_RM = RewardSpec(kind="im_rm", beta=0.1)


@pytest.fixture(scope="module")
def pairs(tiny_model):
    return zero_rank.pairs_for(tiny_model)


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_model(str(tiny_model), kind="im_rm", precision="fp32")


def test_log_prob_sums_are_those_of_full_logits(policy, pairs):
    with torch.no_grad():
        chosen, rejected = log_prob_sums(policy, collate(pairs, pad_id=0)).chunk(2)
        for number, pair in enumerate(pairs):
            for found, response in ((chosen, pair.chosen), (rejected, pair.rejected)):
                expected = float(naive_log_prob(policy, pair.prompt, response))
                assert float(found[number]) == pytest.approx(expected, rel=1e-5)


def test_gradients_in_float64_are_the_naive_ones(policy, pairs):
    ours, naive = copy.deepcopy(policy).double(), copy.deepcopy(policy).double()
    log_prob_sums(ours, collate(pairs[:3], pad_id=0)).sum().backward()
    for pair in pairs[:3]:
        for response in (pair.chosen, pair.rejected):
            naive_log_prob(naive, pair.prompt, response).backward()
    for (name, left), right in zip(ours.named_parameters(), naive.parameters(), strict=True):
        assert (left.grad - right.grad).norm() <= 1e-9 * right.grad.norm(), name


def test_untrained_im_rm_gives_zero_rewards(policy, pairs):
    reference = compute_reference(policy, pairs, pad_id=0, report=lambda row: None)
    scores = score_pairs(
        reward_module(IM_RM, policy),
        pairs,
        pad_id=0,
        device="cpu",
        reference=reference,
        report=lambda row: None,
    )
    largest = max(abs(value) for sums in reference.values() for value in sums)
    assert max(abs(scores[0]).max(), abs(scores[1]).max()) <= IM_RM.beta * 1e-5 * largest


@settings(max_examples=15, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["ex_rm", "im_rm"]))
def test_a_reward_does_not_depend_on_batch_mates_or_order(tiny_model, pairs, data, kind):
    model = load_model(str(tiny_model), kind=kind, precision="fp32")
    if kind == "ex_rm":
        initialise_head(model, seed=0)
    reward = reward_module(RewardSpec(kind=kind, beta=None if kind == "ex_rm" else 0.1), model)
    mates = data.draw(
        st.lists(st.sampled_from(pairs), min_size=1, max_size=5, unique_by=lambda pair: pair.index)
    )
    place = data.draw(st.integers(0, len(mates) - 1))
    reference = {pair.index: (-10.0, -11.0) for pair in pairs}
    with torch.no_grad():
        together = reward(collate(mates, pad_id=data.draw(st.integers(0, 5)), reference=reference))
        alone = reward(collate([mates[place]], pad_id=0, reference=reference))
    for many, one in zip(together, alone, strict=True):
        assert float(many[place]) == pytest.approx(float(one[0]), abs=1e-5)


@pytest.mark.parametrize("kind", ["ex_rm", "im_rm"])
def test_a_saved_model_gives_the_same_rewards(tiny_model, pairs, tmp_path, kind):
    model = load_model(str(tiny_model), kind=kind, precision="fp32")
    if kind == "ex_rm":
        initialise_head(model, seed=5)
    spec = RewardSpec(kind=kind, beta=None if kind == "ex_rm" else 0.1)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_model(model, weights, load_tokenizer(str(tiny_model)), tmp_path / "model")
    again = load_model(str(tmp_path / "model"), kind=kind, precision="fp32")
    reference = {pair.index: (-10.0, -11.0) for pair in pairs}
    batch = collate(pairs, pad_id=0, reference=reference)
    with torch.no_grad():
        for left, right in zip(
            reward_module(spec, model)(batch), reward_module(spec, again)(batch), strict=True
        ):
            assert torch.equal(left, right)


def test_the_head_is_drawn_from_the_seed(tiny_model):
    heads = []
    for seed in (1, 1, 2):
        model = load_model(str(tiny_model), kind="ex_rm", precision="fp32")
        initialise_head(model, seed)
        heads.append(model.score.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std() == pytest.approx(0.02, rel=0.5)


def test_a_reference_with_a_hole_names_the_missing_pairs(policy, pairs, tmp_path):
    reference = compute_reference(policy, pairs, pad_id=0, report=lambda row: None)
    gone = pairs[2].index
    write_reference(
        {index: sums for index, sums in reference.items() if index != gone}, tmp_path / "r.parquet"
    )
    with pytest.raises(Exception, match=rf"pairs \[{gone}\]"):
        read_reference(tmp_path / "r.parquet", pairs)


def test_metrics_by_hand():
    chosen, rejected = (
        torch.tensor([2.0, 1.0, 0.0]).double().numpy(),
        torch.tensor([1.0, 1.0, 3.0]).double().numpy(),
    )
    assert metrics.accuracy(chosen, rejected) == pytest.approx(0.5)
    losses = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(3))]
    assert metrics.loss(chosen, rejected) == pytest.approx(sum(losses) / 3)
    assert metrics.absolute_margin(chosen, rejected) == pytest.approx((4 / 3) / 1.0327955589886444)
    assert metrics.loss(chosen * 1e6, rejected * 1e6) < float("inf")


def test_iid_gaussian_rewards_have_margin_two_over_root_pi():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2, 200_000, generator=generator, dtype=torch.float64).numpy()
    assert metrics.absolute_margin(*rewards) == pytest.approx(2 / math.sqrt(math.pi), abs=0.01)
