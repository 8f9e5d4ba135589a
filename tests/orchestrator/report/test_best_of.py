"""Best of n against enumeration of every draw; candidates of a prompt from its pairs; where curves turn."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report.best_of_n import BestOfCurve
from orchestrator.report.statistics import PromptRewards, best_of, candidates
from trainers.data import worlds
from trainers.data.records import Pair, user_prompt
from trainers.evaluate.scores import PairScores


def enumerated(reward, quality, n):
    """The mean, over all draws of n, of the mean quality of those with the largest reward."""
    picks = []
    for drawn in combinations(range(len(reward)), n):
        top = max(reward[place] for place in drawn)
        picks.append(np.mean([quality[place] for place in drawn if reward[place] == top]))
    return np.mean(picks)


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=7))
def test_best_of_n_is_the_mean_over_every_draw_ties_shared(found):
    reward, quality = (np.array(values, float) for values in zip(*found, strict=True))
    for n in range(1, len(found) + 1):
        assert best_of(reward, quality, n) == pytest.approx(enumerated(reward, quality, n), abs=1e-12)


def test_best_of_two_over_a_plain_set_of_pairs_is_its_accuracy():
    chosen, rejected = np.random.default_rng(0).integers(0, 4, (2, 50)).astype(float)
    pairs = [Pair(prompt=user_prompt(str(row)), chosen="good", rejected="bad") for row in range(50)]
    scores = PairScores(
        chosen=chosen, rejected=rejected, index=np.arange(50), longer=np.zeros(50, dtype=np.int64)
    )
    found = [best_of(item.reward, item.quality, 2) for item in candidates(pairs, scores)]
    assert np.mean(found) == pytest.approx(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def test_candidates_are_distinct_responses_and_quality_is_how_often_they_are_chosen():
    said = [("one", "a", "b"), ("one", "a", "c"), ("one", "b", "c"), ("two", "a", "b")]
    pairs = [Pair(prompt=user_prompt(prompt), chosen=c, rejected=r) for prompt, c, r in said]
    scores = PairScores(
        chosen=np.array([3.0, 3.0, 2.0, 7.0]),
        rejected=np.array([2.0, 1.0, 1.0, 6.0]),
        index=np.arange(4),
        longer=np.zeros(4, dtype=np.int64),
    )
    first, second = candidates(pairs, scores)
    assert first.reward.tolist() == [3.0, 2.0, 1.0]
    assert first.quality.tolist() == [1.0, 0.5, 0.0]
    assert second.reward.tolist() == [7.0, 6.0]


def test_the_tiny_worlds_candidates_are_twelve_a_prompt_half_of_them_right():
    pairs = worlds.candidate_pairs("test")
    assert len(pairs) == 6 * worlds.TINY_TEST_PAIRS
    scores = PairScores(
        chosen=np.ones(len(pairs)),
        rejected=np.zeros(len(pairs)),
        index=np.arange(len(pairs)),
        longer=np.zeros(len(pairs), dtype=np.int64),
    )
    found = candidates(pairs, scores)
    assert {len(item.reward) for item in found} == {12}
    assert {item.quality.mean() for item in found} == {0.5}
    assert {word for pair in pairs for word in pair.chosen.split()} <= set(worlds.VOCABULARY)


def drawn_seeds(pressed, prompts=30, answers=32, seeds=3):
    """Rewards that follow quality, but for a few wrong answers of each prompt, which where `pressed` have the highest."""
    found = []
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        items = []
        for _ in range(prompts):
            quality = (random.random(answers) < 0.5).astype(float)
            quality[:2] = 0.0
            reward = quality + 0.1 * random.normal(size=answers)
            reward[:2] += 3.0 if pressed else 0.0
            items.append(PromptRewards(reward=reward, quality=quality))
        found.append(items)
    return found


@pytest.mark.parametrize("bounded", [True, False], ids=["verifier", "gold"])
def test_a_gold_curve_that_falls_again_turns_and_one_that_rises_does_not(bounded):
    drawn = (1, 2, 4, 8, 16, 32)
    turned = BestOfCurve(
        seeds=drawn_seeds(True), drawn=drawn, labels={}, sampled=True, bounded=bounded
    ).turn()
    assert turned["turns"]
    assert turned["peak"] in (2, 4, 8)
    assert len(turned["by_seed"].split()) == 3
    assert turned["last"] == 32
    # Of all 32 it always picks one of the wrong answers.
    assert turned["change"].value == pytest.approx(-turned["at_peak"].value)
    assert turned["change"].high < 0
    rising = BestOfCurve(
        seeds=drawn_seeds(False), drawn=drawn, labels={}, sampled=True, bounded=bounded
    ).turn()
    assert not rising["turns"]
    assert rising["p"] > 0.05


@pytest.mark.parametrize(("prompts", "turns"), [(1, False), (4, False), (20, True)])
def test_a_few_prompts_that_all_fall_are_no_turn(prompts: int, turns: bool):
    """Without any variance Student's t would call one prompt enough."""
    fooled = PromptRewards(reward=np.array([1.0, 2.0, 3.0]), quality=np.array([1.0, 1.0, 0.0]))
    found = BestOfCurve(seeds=[[fooled] * prompts] * 2, drawn=(1, 3), labels={}, sampled=True).turn()
    assert found["change"].value < 0
    assert found["turns"] == turns


def test_noise_seldom_looks_like_a_turn():
    random, drawn = np.random.default_rng(1), (1, 2, 4, 8, 16)
    turns = 0
    for _ in range(40):
        seeds = [
            [
                PromptRewards(reward=random.normal(size=16), quality=random.integers(0, 2, 16).astype(float))
                for _ in range(20)
            ]
            for _ in range(3)
        ]
        turns += BestOfCurve(seeds=seeds, drawn=drawn, labels={}, sampled=True).turn()["turns"]
    assert turns <= 4


def test_the_numbers_of_candidates_that_some_prompts_lack_are_told_of_the_others():
    random = np.random.default_rng(0)
    seeds = [[PromptRewards(reward=random.normal(size=n), quality=random.random(n)) for n in (4, 4, 9)]]
    rows = BestOfCurve(seeds=seeds, drawn=(1, 8, 16), labels={}).rows()
    assert [(row["n"], row["prompts"]) for row in rows] == [(1, 3), (4, 3), (8, 1)]
    assert {row["kl"] for row in rows} == {None}
