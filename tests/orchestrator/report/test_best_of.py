"""Best of n against enumeration of every draw; candidates of a prompt from its pairs; variance within prompts; where curves turn."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report.best_of_n import BestOfCurve, PromptRewards, best_of, candidates, share_within
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


def test_variance_within_prompts_is_that_which_prompts_do_not_account_for():
    def found(*rewards):
        return [PromptRewards(reward=np.array(item), quality=np.zeros(len(item))) for item in rewards]

    assert share_within(found([1.0, 2.0], [1.0, 2.0])) == pytest.approx(1.0)
    assert share_within(found([1.0, 1.0], [2.0, 2.0])) == pytest.approx(0.0)
    assert share_within(found([0.0, 2.0], [2.0, 4.0])) == pytest.approx(0.5)
    assert share_within(found([5.0, 5.0], [5.0, 5.0])) == 0.0


def drawn_seeds(pressed, prompts=30, answers=32, seeds=3):
    """Rewards that follow quality, but for a few wrong answers of each prompt, which where `pressed` have the highest."""
    random = np.random.default_rng(0)
    quality = (random.random((seeds, prompts, answers)) < 0.5).astype(float)
    quality[..., :2] = 0.0
    reward = quality + 0.1 * random.normal(size=quality.shape)
    reward[..., :2] += 3.0 if pressed else 0.0
    return [[*map(of_prompt, *of_seed)] for of_seed in zip(reward, quality, strict=True)]


def of_prompt(reward, quality):
    return PromptRewards(reward=np.array(reward), quality=np.array(quality))


def turn(seeds, drawn, bounded=True):
    return BestOfCurve(seeds=seeds, drawn=drawn, labels={}, sampled=True, bounded=bounded).turn()


@pytest.mark.parametrize("bounded", [True, False], ids=["verifier", "gold"])
def test_a_gold_curve_that_falls_again_turns_and_one_that_rises_does_not(bounded):
    drawn = (1, 2, 4, 8, 16, 32)
    turned = turn(drawn_seeds(True), drawn, bounded)
    assert turned["turns"]
    assert turned["peak"] in (2, 4, 8)
    assert len(turned["by_seed"].split()) == 3
    assert turned["last"] == 32
    # Of all 32 it always picks one of the wrong answers.
    assert turned["change"].value == pytest.approx(-turned["at_peak"].value)
    assert turned["change"].high < 0
    rising = turn(drawn_seeds(False), drawn, bounded)
    assert not rising["turns"]
    assert rising["p"] > 0.05


@pytest.mark.parametrize(("prompts", "turns"), [(1, False), (4, False), (20, True)])
def test_a_few_prompts_that_all_fall_are_no_turn(prompts: int, turns: bool):
    """Without any variance Student's t would call one prompt enough."""
    seeds = [[of_prompt([1.0, 2.0, 3.0], [1.0, 1.0, 0.0])] * prompts] * 2
    found = turn(seeds, (1, 3))
    assert found["change"].value < 0
    assert found["turns"] == turns
    # Two falls are two tests (Holm).
    assert turn(seeds, (1, 2, 3))["p"] == pytest.approx(min(1.0, 2 * found["p"]))


def test_noise_seldom_looks_like_a_turn():
    random = np.random.default_rng(1)

    def noise():
        rewards, qualities = random.normal(size=(20, 16)), random.integers(0, 2, (20, 16)).astype(float)
        return [*map(of_prompt, rewards, qualities)]

    assert sum(turn([noise() for _ in range(3)], (1, 2, 4, 8, 16))["turns"] for _ in range(40)) <= 4


def test_the_numbers_of_candidates_that_some_prompts_lack_are_told_of_the_others():
    random = np.random.default_rng(0)
    seeds = [[of_prompt(random.normal(size=n), random.random(n)) for n in (4, 4, 9)]]
    rows = BestOfCurve(seeds=seeds, drawn=(1, 8, 16), labels={}).rows()
    assert [(row["n"], row["prompts"]) for row in rows] == [(1, 3), (4, 3), (8, 1)]
    assert {row["kl"] for row in rows} == {None}
