"""What choosing by a reward is worth: expected quality of the best of n candidates, exactly, and reward variance.

Candidates of a prompt are the distinct responses that a set holds of it. A response that is chosen in some of its pairs
and rejected in others has as quality the share in which it is chosen; those of most sets are 1 and 0.
Shapes: C candidates of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from orchestrator.report.statistics import Floats
from trainers.data.records import Pair
from trainers.scores import PairScores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """The distinct responses of one prompt, with reward and quality."""

    reward: Floats
    quality: Floats


def best_of(reward_C: Floats, quality_C: Floats, n: int) -> float:
    """Expected quality of the best by reward of n candidates drawn without replacement, 1 ≤ n ≤ C.

    Of C(C, n) draws, C(m + t, n) − C(m, n) have their best among t candidates of equal reward above m others; each of
    the t is then picked as often.
    """
    every, expected, below = comb(len(reward_C), n), 0.0, 0
    for value in np.unique(reward_C):
        here_C = reward_C == value
        count = int(here_C.sum())
        share = (comb(below + count, n) - comb(below, n)) / every
        expected += share * float(quality_C[here_C].mean())
        below += count
    return expected


def candidates(pairs: Sequence[Pair], scores: PairScores) -> list[Candidates]:
    """Of each prompt, in the order in which prompts first stand in the scores; `pairs` are the rows of the source split."""
    prompts: dict[object, dict[str, list[tuple[float, float]]]] = {}
    rows = zip(scores.index.tolist(), scores.chosen.tolist(), scores.rejected.tolist(), strict=True)
    for row, chosen, rejected in rows:
        pair = pairs[row]
        said = prompts.setdefault(pair.prompt, {})
        said.setdefault(pair.chosen, []).append((chosen, 1.0))
        said.setdefault(pair.rejected, []).append((rejected, 0.0))
    # One text is scored once per pair, equal up to rounding.
    return [
        Candidates(
            reward=np.array([np.mean([reward for reward, _ in found]) for found in said.values()]),
            quality=np.array([np.mean([quality for _, quality in found]) for found in said.values()]),
        )
        for said in prompts.values()
    ]


def share_within(found: Sequence[Candidates]) -> float:
    """The share of the variance of all candidates' rewards that lies within prompts; 0 where rewards do not vary."""
    everything = np.concatenate([item.reward for item in found])
    centre = everything.mean()
    total = float(((everything - centre) ** 2).sum())
    within = sum(float(((item.reward - item.reward.mean()) ** 2).sum()) for item in found)
    return within / total if total > 1e-24 * max(1.0, centre**2) else 0.0


def spreads(found: Sequence[Candidates]) -> Floats:
    """Of each prompt: the standard deviation of its candidates' rewards over that of all candidates."""
    spread = float(np.concatenate([item.reward for item in found]).std())
    return np.array([item.reward.std() / spread if spread > 0 else 0.0 for item in found])
