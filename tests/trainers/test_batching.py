"""The split of a step among ranks and forwards, and of pairs into scoring groups."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.pairs.packing import (
    collate,
    epoch_order,
    forward_cost,
    scoring_groups,
    split_step,
    steps_of_epoch,
)
from trainers.pairs.tokens import TokenPair
from trainers.specs import OptimSpec
from trainers.train import loop

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=40)
RANKS = st.sampled_from([1, 2, 3, 4])


def weight(forward, lengths, padded=False):
    """Tokens that a forward computes."""
    sizes = [lengths[position] for position in forward]
    return len(sizes) * max(sizes, default=0) if padded else sum(sizes)


@given(LENGTHS, RANKS, st.integers(1, 2000), st.integers(1, 40), st.booleans())
def test_every_pair_of_a_step_is_run_once_within_the_budget_and_every_rank_runs_as_many_forwards(
    lengths, world_size, budget, effective_batch, padded
):
    for step in steps_of_epoch(list(range(len(lengths))), effective_batch):
        ranks = split_step(
            step, dict(enumerate(lengths)), world_size=world_size, forward_tokens=budget, padded=padded
        )
        assert len(ranks) == world_size
        assert len({len(forwards) for forwards in ranks}) == 1
        assert all(
            len(forward) <= 1 or weight(forward, lengths, padded) <= budget
            for forwards in ranks
            for forward in forwards
        )
        assert sorted(i for forwards in ranks for forward in forwards for i in forward) == sorted(step)


@pytest.mark.parametrize(("budget", "forwards"), [(400, 1), (399, 2), (200, 2), (199, 4), (100, 4), (1, 4)])
def test_pairs_of_one_length_take_the_fewest_forwards_that_the_budget_allows(budget, forwards):
    ranks = split_step(range(8), dict.fromkeys(range(8), 100), world_size=2, forward_tokens=budget)
    assert [len(rank) for rank in ranks] == [forwards, forwards]


def test_a_pair_that_is_longer_than_the_budget_is_a_forward_by_itself():
    ranks = split_step(range(4), dict(enumerate([900, 100, 100, 100])), world_size=1, forward_tokens=300)
    assert ranks == [[[0], [1, 2, 3]]]


def test_forwards_that_run_together_are_of_one_size():
    lengths = dict(enumerate([1000, 900, 200, 190, 180, 170]))
    ranks = split_step(range(6), lengths, world_size=2, forward_tokens=1000)
    sizes = [[weight(forward, lengths) for forward in rank] for rank in ranks]
    assert sizes == [[1000, 370], [900, 370]]


def test_a_pair_of_padded_rows_costs_two_of_its_longer_row_and_one_that_cannot_share_its_prompt_costs_it_twice():
    pair = TokenPair(index=0, prompt=[1] * 5, chosen=[2], rejected=[3] * 3)
    assert forward_cost(pair, "packed", None) == forward_cost(pair, "packed", 8) == 9
    assert forward_cost(pair, "packed", 7) == 14 == collate([pair], shared_tokens=7).tokens
    assert forward_cost(pair, "rows", None) == 16


def test_order_of_an_epoch_is_seeded_and_differs_between_epochs():
    assert epoch_order(50, seed=1, epoch=0) == epoch_order(50, seed=1, epoch=0)
    assert epoch_order(50, seed=1, epoch=0) != epoch_order(50, seed=1, epoch=1)
    assert sorted(epoch_order(50, seed=1, epoch=2)) == list(range(50))


@given(st.lists(st.integers(1, 500), min_size=8, max_size=64), RANKS, st.integers(1, 4000))
def test_no_forward_could_be_made_lighter_by_a_pair_that_is_longer_than_the_gap(lengths, world_size, budget):
    ranks = split_step(
        range(len(lengths)), dict(enumerate(lengths)), world_size=world_size, forward_tokens=budget
    )
    sums = [weight(forward, lengths) for rank in ranks for forward in rank]
    assert max(sums) - min(sums) <= max(lengths)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_scoring_groups_hold_every_pair_once_longest_first_and_as_many_as_fit(lengths, budget):
    pairs = [TokenPair(index=i, prompt=[1] * n, chosen=[2], rejected=[3]) for i, n in enumerate(lengths)]
    groups = list(scoring_groups(pairs, tokens=budget))
    flat = [pair for group in groups for pair in group]
    assert sorted(pair.index for pair in flat) == list(range(len(pairs)))
    assert [pair.tokens for pair in flat] == sorted((pair.tokens for pair in pairs), reverse=True)
    sizes = [sum(pair.tokens for pair in group) for group in groups]
    assert all(len(group) == 1 or size <= budget for group, size in zip(groups, sizes, strict=True))
    for size, following in zip(sizes, groups[1:], strict=False):
        assert size + following[0].tokens > budget


@pytest.mark.parametrize(("pairs", "batch", "epochs"), [(7, 3, 3), (6, 3, 2), (2, 5, 1)])
def test_a_training_that_goes_on_draws_the_steps_that_were_left(pairs: int, batch: int, epochs: int):
    optim = OptimSpec(epochs=epochs, effective_batch=batch)
    inputs = SimpleNamespace(pairs=range(pairs), seed=3, optim=optim, steps_of_epoch=-(-pairs // batch))
    whole = [
        (epoch, step)
        for epoch in range(epochs)
        for step in steps_of_epoch(epoch_order(pairs, 3, epoch), batch)
    ]
    for done in range(len(whole) + 1):
        assert list(loop._steps(inputs, done)) == whole[done:]


@given(LENGTHS, RANKS, st.integers(1, 2000))
def test_no_more_forwards_than_hold_the_step_however_its_pairs_fall(lengths, world_size, budget):
    ranks = split_step(
        range(len(lengths)), dict(enumerate(lengths)), world_size=world_size, forward_tokens=budget
    )
    forwards = len(ranks[0])
    assert forwards <= -(-len(lengths) // world_size)
    # Where the mean leaves room for the longest pair on top, no pair can have been in the way.
    room = budget - max(lengths)
    if room > 0:
        assert forwards <= -(-sum(lengths) // (world_size * room))


def test_no_pair_is_dropped_at_the_end_of_an_epoch():
    assert [len(step) for step in steps_of_epoch(range(11), 4)] == [4, 4, 3]
