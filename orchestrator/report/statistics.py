"""Statistics of per-pair rewards: bootstrap over test pairs and seeds, permutation tests, win-rates, calibration, best of n.

Pure numpy; scipy only in `permutation_p`, imported there. What each number means: docs/report.md.
Shapes: P pairs of one set, U units (different pairs or prompts), S seeds, B draws of the bootstrap, C candidates of a prompt.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.data.records import Pair
from trainers.evaluate.scores import PairScores

Floats = NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95
PERMUTATIONS = 1999
TIE = 0.01
BINS = 10
TENTHS = 10
RESAMPLED = ("accuracy", "loss", "abs_margin")
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, its 95 % interval, and the sample standard deviation over seeds where there are two or more."""

    value: float
    low: float
    high: float
    std: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Cells in which the first of two is ahead, tied within `TIE`, or behind."""

    ahead: int
    ties: int
    behind: int

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return self.ahead + self.ties + self.behind

    @property
    def share(self) -> float:
        """Share of cells in which the first is ahead; 0 where there is no cell."""
        return self.ahead / self.cells if self.cells else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Does σ(|margin|) say how often a pair is ranked right? The curve has one point per bin of as many pairs."""

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    expected_error: float
    brier: float
    pairs: int


def generator(*name: str) -> np.random.Generator:
    """Return a random generator that depends on a name alone, so that the draws of one set do not depend on another."""
    return np.random.default_rng(list(hashlib.sha256("/".join(name).encode()).digest()))


def pair_counts(units: int, draws: int, random: np.random.Generator) -> Floats:
    """Draw pairs with replacement and return how often each is drawn, [B, U]; each row sums to U."""
    return random.multinomial(units, np.full(units, 1.0 / units), size=draws).astype(np.float64)


def seed_weights(seeds: int, draws: int, random: np.random.Generator) -> Floats:
    """Return the weights of the seeds in each draw, [B, S]; each row sums to 1.

    Plain resampling of S values understates the variance of their mean by (S − 1)/S, a third at three seeds: the
    deviations from 1/S are widened by √(S/(S − 1)), the rescaled bootstrap of Rao and Wu (1988).
    """
    if seeds == 1:
        return np.ones((draws, 1))
    deviations = random.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=draws) / seeds - 1.0 / seeds
    return 1.0 / seeds + np.sqrt(seeds / (seeds - 1.0)) * deviations


def resampled_metrics(chosen_P: Floats, rejected_P: Floats, counts_BP: Floats) -> dict[str, Floats]:
    """Return every metric of one set in each draw, [B]; not a number where a draw holds none of its pairs."""
    pairs = len(chosen_P)
    centre = np.mean(np.concatenate([chosen_P, rejected_P]))
    above, below = chosen_P - centre, rejected_P - centre
    margin = chosen_P - rejected_P
    terms = np.stack(
        [
            right(chosen_P, rejected_P),
            np.logaddexp(0.0, -margin),
            np.abs(margin),
            above + below,
            above**2 + below**2,
        ],
        axis=1,
    )
    total_B1 = counts_BP.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy, loss, gap, first, second = (counts_BP @ terms / total_B1).T
        variance = pairs * (second - first**2 / 2.0) / (2.0 * pairs - 1.0)
        spread = np.sqrt(np.maximum(variance, 0.0))
        flat = spread <= 1e-12 * max(1.0, float(np.abs(terms[:, 2]).max()))
        scaled = np.where(flat, 0.0, gap / np.where(flat, 1.0, spread))
    return dict(zip(RESAMPLED, (accuracy, loss, scaled), strict=True))


def estimate(value: float, draws_B: Floats, seed_values: Sequence[float] = ()) -> Estimate:
    """Return `value` with the percentile interval of its draws and the standard deviation of its values by seed."""
    known = draws_B[np.isfinite(draws_B)]
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(known, [tail, 1.0 - tail]) if len(known) else (value, value)
    std = float(np.std(seed_values, ddof=1)) if len(seed_values) > 1 else None
    return Estimate(value=float(value), low=float(low), high=float(high), std=std)


def unanimous_bound(pairs: int) -> float:
    """Return the highest rate of exceptions that so many pairs without one leave possible (Clopper–Pearson): 0.018 at 200.

    Where all pairs agree every draw of the bootstrap says the same, and its interval would have no width.
    """
    return float(1.0 - ((1.0 - LEVEL) / 2.0) ** (1.0 / pairs))


def accuracy_estimate(
    value: float, draws_B: Floats, pairs: int, seed_values: Sequence[float] = ()
) -> Estimate:
    """`estimate` of an accuracy on so many pairs, with `unanimous_bound` where it is 0 or 1."""
    found = estimate(value, draws_B, seed_values)
    if value <= 0.0:
        return replace(found, high=max(found.high, unanimous_bound(pairs)))
    if value >= 1.0:
        return replace(found, low=min(found.low, 1.0 - unanimous_bound(pairs)))
    return found


def gap_estimate(value: float, draws_B: Floats, pairs: int, seed_values: Sequence[float] = ()) -> Estimate:
    """`estimate` of a difference of accuracies, with `unanimous_bound` where no draw shows one and where it is 1 or −1."""
    # Equal means may differ in their last bit.
    found = estimate(round(value, 12), np.round(draws_B, 12), seed_values)
    bound = unanimous_bound(pairs)
    if found.low == found.high == 0.0:
        return replace(found, low=-bound, high=bound)
    if abs(found.value) < 1.0:
        return found
    inner = found.value * (1.0 - bound)
    return replace(found, low=min(found.low, inner), high=max(found.high, inner))


def over_seeds(
    values_SU: Floats, units: np.random.Generator, seeds: np.random.Generator
) -> tuple[float, Floats, list[float]]:
    """Return the mean of values by seed and unit, its draws [B] over both, and the mean of each seed.

    Rounded, as equal means may differ in their last bit, and their interval then has no width.
    """
    count_S, count_U = values_SU.shape
    drawn_BS = pair_counts(count_U, DRAWS, units) @ values_SU.T / count_U
    draws_B = (seed_weights(count_S, DRAWS, seeds) * drawn_BS).sum(axis=1)
    by_seed = values_SU.mean(axis=1)
    return round(float(by_seed.mean()), 12), np.round(draws_B, 12), by_seed.tolist()


def permutation_p(differences: Floats, resamples: int = PERMUTATIONS) -> float:
    """Return the two-sided p of a paired permutation test, which flips the signs of differences and compares their sum.

    Exact where all flips are fewer than `resamples`. The smallest value that n units allow is 2/2ⁿ.
    """
    from scipy.stats import permutation_test

    # A difference of zero has no sign to flip.
    moved = differences[differences != 0]
    if len(moved) < 2:
        return 1.0
    found = permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def rank_correlation(first_P: Floats, second_P: Floats) -> float | None:
    """Return Spearman's rank correlation; None of fewer than three pairs, or where one of the two does not vary."""
    from scipy.stats import spearmanr

    if len(first_P) < 3 or np.ptp(first_P) == 0 or np.ptp(second_P) == 0:
        return None
    return float(spearmanr(first_P, second_P).statistic)


def win_rate(differences: Sequence[float], tie: float = TIE) -> WinRate:
    """Count the differences of accuracy above and below 0; those within `tie` (0.01: one point) are ties."""
    # Accuracies are sums of binary fractions: a difference of exactly one point may read 0.0100000000000001.
    ahead = sum(value > tie + 1e-9 for value in differences)
    behind = sum(value < -tie - 1e-9 for value in differences)
    return WinRate(ahead=ahead, ties=len(differences) - ahead - behind, behind=behind)


def calibration(margins_P: Floats, bins: int = BINS) -> Calibration:
    """Return the reliability of σ(margin), the Bradley–Terry probability of the ranking.

    Which of the two responses is named first is a convention, so the confidence is that in the response ranked
    higher, σ(|margin|) ≥ ½. Bins hold equally many pairs, since implicit rewards are often all close to ½. Brier is
    the mean of (1 − σ(margin))²; a coin scores 0.25.
    """
    sorted_P = margins_P[np.argsort(np.abs(margins_P), kind="stable")]
    confidence_P = 1.0 / (1.0 + np.exp(-np.abs(sorted_P)))
    right_P = right(sorted_P, np.zeros(len(sorted_P)))
    filled = [rows for rows in np.array_split(np.arange(len(sorted_P)), bins) if len(rows)]
    confidence = tuple(float(confidence_P[rows].mean()) for rows in filled)
    accuracy = tuple(float(right_P[rows].mean()) for rows in filled)
    gaps = [abs(a - c) for a, c in zip(accuracy, confidence, strict=True)]
    return Calibration(
        confidence=confidence,
        accuracy=accuracy,
        expected_error=float(np.average(gaps, weights=[len(rows) for rows in filled])),
        brier=float(np.mean(np.exp(-np.logaddexp(0.0, margins_P)) ** 2)),
        pairs=len(margins_P),
    )


def half_width(pairs: int, accuracy: float = 0.75) -> float:
    """Return half of the 95 % interval of an accuracy on so many pairs, by the normal approximation: 0.06 at 200 pairs."""
    return _NORMAL_95 * float(np.sqrt(accuracy * (1.0 - accuracy) / pairs))


def right(chosen_P: Floats, rejected_P: Floats) -> Floats:
    """Return 1 for each pair ranked right, ½ for a tie, else 0; the mean is the accuracy."""
    return (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)


def scaled_margins(chosen_P: Floats, rejected_P: Floats) -> Floats:
    """Return margins over the standard deviation of all 2P rewards, so that reward types can be compared."""
    spread = float(np.std(np.concatenate([chosen_P, rejected_P]), ddof=1))
    return (chosen_P - rejected_P) / spread if spread > 0 else np.zeros(len(chosen_P))


def decile_of(values_P: Floats) -> NDArray[np.int64]:
    """Return the tenth that each pair is in, 0 for the smallest values; equal values are in the tenth of their first."""
    # By how many pairs have a smaller value, not by quantiles, which may fall between equal values.
    below_P = np.searchsorted(np.sort(values_P), values_P, side="left")
    found: NDArray[np.int64] = (below_P * TENTHS) // len(values_P)
    return found


def by_decile(values_P: Floats, right_P: Floats) -> list[dict[str, Any]]:
    """Return for each tenth its number from 1, its range of values, its pairs and their accuracy."""
    tenth_P, rows = decile_of(values_P), list[dict[str, Any]]()
    for number in np.unique(tenth_P):
        here_P = tenth_P == number
        count = int(here_P.sum())
        random = generator("decile", str(number), str(count))
        value, draws_B, _ = over_seeds(right_P[None, here_P], random, random)
        rows.append(
            {
                "decile": int(number) + 1,
                "from": float(values_P[here_P].min()),
                "to": float(values_P[here_P].max()),
                "pairs": count,
                "accuracy": accuracy_estimate(value, draws_B, count),
            }
        )
    return rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """The distinct responses that a set holds of one prompt; `quality` is the share of its pairs in which one is chosen."""

    reward: Floats
    quality: Floats


def candidates(pairs: Sequence[Pair], scores: PairScores) -> list[Candidates]:
    """Return the candidates of each prompt, in the order of the scores; `pairs` are the rows of the split."""
    prompts: dict[object, dict[str, list[tuple[float, float]]]] = {}
    for row, chosen, rejected in zip(scores.index, scores.chosen, scores.rejected, strict=True):
        said = prompts.setdefault(pairs[row].prompt, {})
        said.setdefault(pairs[row].chosen, []).append((chosen, 1.0))
        said.setdefault(pairs[row].rejected, []).append((rejected, 0.0))
    # One text is scored once per pair, equal up to rounding.
    means = [np.array([np.mean(found, axis=0) for found in said.values()]) for said in prompts.values()]
    return [
        Candidates(reward=reward_C, quality=quality_C) for reward_C, quality_C in (item.T for item in means)
    ]


def best_of(reward_C: Floats, quality_C: Floats, n: int) -> float:
    """Return the expected quality of the best by reward of n candidates drawn without replacement, 1 ≤ n ≤ C.

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


def share_within(found: Sequence[Candidates]) -> float:
    """Return the share of the variance of all candidates' rewards that lies within prompts; 0 where rewards do not vary."""
    everything = np.concatenate([item.reward for item in found])
    total = float(everything.var() * len(everything))
    within = sum(float(item.reward.var() * len(item.reward)) for item in found)
    return within / total if total > 1e-24 * max(1.0, float(everything.mean()) ** 2) else 0.0


def spreads(found: Sequence[Candidates]) -> Floats:
    """Return for each prompt the standard deviation of its candidates' rewards, divided by that of all candidates."""
    spread = float(np.concatenate([item.reward for item in found]).std())
    return np.array([item.reward.std() / spread if spread > 0 else 0.0 for item in found])
