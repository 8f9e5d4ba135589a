"""Statistics of per-pair rewards: bootstrap over test pairs and seeds, paired permutation tests, win-rates, calibration.

Pure numpy; scipy only in `permutation_p`, imported there. What each number means: docs/report.md.
Shapes: P pairs of one set, U different pairs of sets that share them, S seeds, B draws of the bootstrap.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95
PERMUTATIONS = 1999
TIE = 0.01
BINS = 10
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
        """All of them."""
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
    """Random numbers that depend on a name alone, so that what is drawn for one set changes with no other."""
    return np.random.default_rng(list(hashlib.sha256("/".join(name).encode()).digest()))


def pair_counts(units: int, draws: int, random: np.random.Generator) -> Floats:
    """How often each pair is drawn, with replacement: [B, U], each row sums to U."""
    return random.multinomial(units, np.full(units, 1.0 / units), size=draws).astype(np.float64)


def seed_weights(seeds: int, draws: int, random: np.random.Generator) -> Floats:
    """Weights of the seeds in each draw: [B, S], each row sums to 1; all on the one seed where there is no other.

    Plain resampling of S values understates the variance of their mean by (S − 1)/S, a third at three seeds: the
    deviations from 1/S are widened by √(S/(S − 1)), the rescaled bootstrap of Rao and Wu (1988).
    """
    if seeds == 1:
        return np.ones((draws, 1))
    deviations = random.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=draws) / seeds - 1.0 / seeds
    return 1.0 / seeds + np.sqrt(seeds / (seeds - 1.0)) * deviations


def resampled_metrics(chosen_P: Floats, rejected_P: Floats, counts_BP: Floats) -> dict[str, Floats]:
    """Every metric of one set in each draw, [B]; not a number where a draw holds none of its pairs."""
    pairs = len(chosen_P)
    centre = np.mean(np.concatenate([chosen_P, rejected_P]))
    above, below = chosen_P - centre, rejected_P - centre
    margin = chosen_P - rejected_P
    terms = np.stack(
        [
            (margin > 0) + 0.5 * (margin == 0),
            np.logaddexp(0.0, -margin),
            np.abs(margin),
            above + below,
            above**2 + below**2,
        ],
        axis=1,
    )
    total_B1 = counts_BP.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        right, loss, gap, first, second = (counts_BP @ terms / total_B1).T
        variance = pairs * (second - first**2 / 2.0) / (2.0 * pairs - 1.0)
        spread = np.sqrt(np.maximum(variance, 0.0))
        flat = spread <= 1e-12 * max(1.0, float(np.abs(terms[:, 2]).max()))
        scaled = np.where(flat, 0.0, gap / np.where(flat, 1.0, spread))
    return dict(zip(RESAMPLED, (right, loss, scaled), strict=True))


def estimate(value: float, draws_B: Floats, seed_values: Sequence[float] = ()) -> Estimate:
    """`value` with the percentile interval of its draws, and the spread of its values by seed."""
    known = draws_B[np.isfinite(draws_B)]
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(known, [tail, 1.0 - tail]) if len(known) else (value, value)
    std = float(np.std(seed_values, ddof=1)) if len(seed_values) > 1 else None
    return Estimate(value=float(value), low=float(low), high=float(high), std=std)


def unanimous_bound(pairs: int) -> float:
    """The rate of exceptions that so many pairs without one do not exclude (Clopper–Pearson): 0.018 at 200 pairs.

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


def difference_estimate(
    value: float, draws_B: Floats, pairs: int, seed_values: Sequence[float] = ()
) -> Estimate:
    """`estimate` of a difference of accuracies, with `unanimous_bound` where no draw shows one."""
    found = estimate(value, draws_B, seed_values)
    if found.low == found.high == 0.0:
        return replace(found, low=-unanimous_bound(pairs), high=unanimous_bound(pairs))
    return found


def permutation_p(differences: Floats, resamples: int = PERMUTATIONS) -> float:
    """Two-sided p of a paired permutation test: signs of paired differences are flipped, their sum is compared.

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


def win_rate(differences: Sequence[float], tie: float = TIE) -> WinRate:
    """Count differences of accuracy; those within `tie` (0.01: one point) are ties (the paper's §3 of the reference)."""
    # Accuracies are sums of binary fractions: a difference of exactly one point may read 0.0100000000000001.
    ahead = sum(value > tie + 1e-9 for value in differences)
    behind = sum(value < -tie - 1e-9 for value in differences)
    return WinRate(ahead=ahead, ties=len(differences) - ahead - behind, behind=behind)


def calibration(margins_P: Floats, bins: int = BINS) -> Calibration:
    """Reliability of σ(margin), the Bradley–Terry probability of the ranking.

    Which of the two responses is named first is a convention, so the confidence is that in the response ranked
    higher, σ(|margin|) ≥ ½. Bins hold equally many pairs, since implicit rewards are often all close to ½. Brier is
    the mean of (1 − σ(margin))²; a coin scores 0.25.
    """
    order = np.argsort(np.abs(margins_P), kind="stable")
    sorted_P = margins_P[order]
    confidence_P = 1.0 / (1.0 + np.exp(-np.abs(sorted_P)))
    right_P = (sorted_P > 0) + 0.5 * (sorted_P == 0)
    filled = [rows for rows in np.array_split(np.arange(len(sorted_P)), bins) if len(rows)]
    confidence = [float(confidence_P[rows].mean()) for rows in filled]
    accuracy = [float(right_P[rows].mean()) for rows in filled]
    weights = [len(rows) / len(sorted_P) for rows in filled]
    gaps = (w * abs(a - c) for w, a, c in zip(weights, accuracy, confidence, strict=True))
    miss_P = np.exp(-np.logaddexp(0.0, margins_P))
    return Calibration(
        confidence=tuple(confidence),
        accuracy=tuple(accuracy),
        expected_error=float(sum(gaps)),
        brier=float(np.mean(miss_P**2)),
        pairs=len(margins_P),
    )


def half_width(pairs: int, accuracy: float = 0.75) -> float:
    """Half of the 95 % interval of an accuracy on so many pairs, by the normal approximation: 0.06 at 200 pairs."""
    return _NORMAL_95 * float(np.sqrt(accuracy * (1.0 - accuracy) / pairs))


def right(chosen_P: Floats, rejected_P: Floats) -> Floats:
    """1 for each pair ranked right, ½ for a tie, else 0; its mean is the accuracy."""
    return (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)


def scaled_margins(chosen_P: Floats, rejected_P: Floats) -> Floats:
    """Margins over the standard deviation of all 2P rewards, so that reward types can be laid over one another."""
    spread = float(np.std(np.concatenate([chosen_P, rejected_P]), ddof=1))
    return (chosen_P - rejected_P) / spread if spread > 0 else np.zeros(len(chosen_P))
