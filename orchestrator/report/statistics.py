"""Statistics of per-pair rewards: intervals over models, seeds and pairs, permutation tests, win-rates, calibration.

Pure numpy; scipy is imported on use. docs/report.md explains each number.
Shapes: P pairs of one set, U units (different pairs or prompts), K trainings, S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
PERMUTATIONS = 1999
TIE = 0.01
BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, its 95 % interval, and the sample standard deviation over two or more seeds.

    `p` is the two-sided p of no difference, if there are several trainings; it is below 0.05 if the interval excludes 0.
    """

    value: float
    low: float
    high: float
    std: float | None = None
    p: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Cells in which the first of two is ahead, tied within `TIE`, or behind."""

    ahead: int
    ties: int
    behind: int

    @property
    def cells(self) -> int:
        return self.ahead + self.ties + self.behind

    @property
    def share(self) -> float:
        """Return the share of cells in which the first is ahead."""
        return self.ahead / self.cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How well σ(|margin|) predicts that a pair is ranked right. The curve has one point per bin; bins are equally large."""

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    expected_error: float
    brier: float
    pairs: int


def jackknifed(value: float, without_P: Floats) -> Floats:
    """Return what each pair adds to `value`, [P], from the value without each pair; the sum is nearly the value."""
    pairs = len(without_P)
    return (value + (pairs - 1) * (value - without_P)) / pairs


def by_unit(
    added_P: Floats, units_P: NDArray[np.int64], units_U: NDArray[np.int64], *, corrected: bool
) -> Floats:
    """Return what each of the sorted units adds, [U], where `corrected` for their numbers of pairs: a unit may have several, or none.

    The sum is the same. A variance needs the correction; a test that flips signs must not give a unit what others hold.
    """
    at_P = np.searchsorted(units_U, units_P)
    counts_U, added_U = (np.bincount(at_P, values, len(units_U)) for values in (None, added_P))
    return added_U + corrected * added_P.sum() * (1 / len(units_U) - counts_U / len(units_P))


def margin_without_each(chosen_P: Floats, rejected_P: Floats) -> Floats:
    """Return the absolute margin of all pairs but one, for each of two pairs or more, [P]."""
    centre = np.mean(np.concatenate([chosen_P, rejected_P]))
    above_P, below_P = chosen_P - centre, rejected_P - centre
    gap_P, sum_P, square_P = np.abs(above_P - below_P), above_P + below_P, above_P**2 + below_P**2
    left = len(chosen_P) - 1
    first_P, second_P = sum_P.sum() - sum_P, square_P.sum() - square_P
    spread_P = np.sqrt(np.maximum(0.0, (second_P - first_P**2 / (2 * left)) / (2 * left - 1)))
    flat_P = spread_P <= 1e-12 * max(1.0, float(gap_P.max()))
    return np.where(flat_P, 0.0, (gap_P.sum() - gap_P) / left / np.where(flat_P, 1.0, spread_P))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The variance of a mean and its degrees of freedom; `trainings` counts those of trainings, 0 if there is one of each."""

    variance: float
    degrees: float
    trainings: int


def crossed(strata: Sequence[Floats], groups_U: NDArray[np.int64]) -> Spread:
    """Return the spread of a mean over trainings and test pairs that all trainings share.

    Each of `strata`, [U, K], holds what each pair adds in K trainings that were drawn alike: all models, or the seeds of
    one of several fixed models. `groups_U` numbers the set of a pair. The variance is that of the trainings' means,
    which a Student-t takes, plus that of pairs, less what both hold, and no less than either; its degrees of freedom are Satterthwaite's (1946).
    """
    mean_U1 = np.mean([values_UK.mean(axis=1, keepdims=True) for values_UK in strata], axis=0)
    pair_degrees = max(1, len(groups_U) - len(np.unique(groups_U)))
    pairs = of_pairs(mean_U1, groups_U)
    trainings, *within = of_trainings(strata, groups_U)
    if not trainings:
        return Spread(variance=_sound(pairs), degrees=pair_degrees, trainings=0)
    each = sum(1 / values_UK.shape[1] for values_UK in strata) / len(strata) ** 2
    between, both = (each * variance for variance in within)
    # A difference of mean squares may come out too small: the whole is no less than either part.
    variance = max(between + pairs - both, between, pairs)
    weighed = between**2 / trainings + pairs**2 / pair_degrees + both**2 / (trainings * pair_degrees)
    degrees = max(variance**2 / weighed if weighed else 0.0, min(trainings, pair_degrees))
    return Spread(variance=_sound(variance), degrees=degrees, trainings=trainings)


def of_trainings(strata: Sequence[Floats], groups_U: NDArray[np.int64]) -> tuple[int, float, float]:
    """Return how many trainings differ freely within strata, the variance of one, and its part that also varies over pairs."""
    trainings = sum(values_UK.shape[1] - 1 for values_UK in strata)
    deviations = [values_UK - values_UK.mean(axis=1, keepdims=True) for values_UK in strata]
    within = sum(float((left_UK.sum(axis=0) ** 2).sum()) for left_UK in deviations)
    both = sum(of_pairs(left_UK, groups_U) for left_UK in deviations)
    return trainings, within / max(1, trainings), both / max(1, trainings)


def of_pairs(values_UK: Floats, groups_U: NDArray[np.int64]) -> float:
    """Return the variance of the sum over pairs, added over columns."""
    pairs_G = np.bincount(groups_U)
    factor_U = (pairs_G / np.maximum(1, pairs_G - 1))[groups_U]
    centre_GK = np.stack([np.bincount(groups_U, column) / pairs_G for column in values_UK.T], axis=1)
    return float((factor_U[:, None] * (values_UK - centre_GK[groups_U]) ** 2).sum())


def _sound(variance: float) -> float:
    """Return the variance; 0 if it is only the rounding of equal numbers."""
    return variance if variance > 1e-20 else 0.0


def unbounded_interval(value: float, spread: Spread) -> Estimate:
    """Return the Student-t interval and the p of a number without bounds."""
    from scipy.special import stdtrit

    half = float(stdtrit(spread.degrees, (1 + LEVEL) / 2)) * spread.variance**0.5
    return Estimate(value=value, low=value - half, high=value + half, p=_p(value, spread))


def bounded_interval(
    value: float, spread: Spread, pairs: int, *, floor: int, units: int | None = None
) -> Estimate:
    """Return the interval and p of an accuracy (`floor` 0) or of a difference of accuracies (`floor` −1) on so many pairs.

    A Student-t interval, widened to the one on Fisher's scale, which respects the bounds, with two uninformative pairs added
    (Agresti and Coull 1998). If nothing varies, it is the exact binomial interval. A difference on so few `units` (pairs of all
    sets, each once; default `pairs`) that a sign test would not tell it even if all agreed is no lead.
    """
    from scipy.special import stdtrit

    value, half_width = min(1.0, max(float(floor), value)), (1 - floor) / 2
    error, student = spread.variance**0.5, float(stdtrit(spread.degrees, (1 + LEVEL) / 2))
    scaled = (1 - (1 - value) / half_width) * pairs / (pairs + 2)
    slope = (1 - scaled**2) * half_width
    ends = 1 - (1 - np.tanh(np.arctanh(scaled) + np.array([-1, 1]) * student * error / slope)) * half_width
    low, high = min(value - student * error, float(ends[0])), max(value + student * error, float(ends[1]))
    p = _p(value, spread)
    if floor and spread.variance > 0:
        p = max(p, _p(float(np.arctanh(scaled)) * slope, spread))
    if error == 0:
        exact = _exact(abs(value), pairs)
        if value < 0:
            exact = (-exact[1], -exact[0])
        elif floor and value == 0:
            exact = (-exact[1], exact[1])
        low, high = min(low, exact[0]), max(high, exact[1])
    if floor and value:
        units = units or pairs
        p = max(p, 0.5 ** (units - 1))
        if 0.5 ** (units - 1) > 1 - LEVEL:
            end = 1 - 2 * _exact(abs(value), units)[0]
            low, high = (min(low, -end), high) if value > 0 else (low, max(high, end))
    return Estimate(value=value, low=max(low, float(floor)), high=min(high, 1.0), p=p)


def _p(value: float, spread: Spread) -> float:
    from scipy.special import stdtr

    if value == 0 or spread.variance == 0:
        return float(value == 0)
    return float(2 * stdtr(spread.degrees, -abs(value) / spread.variance**0.5))


def _exact(share: float, pairs: int) -> tuple[float, float]:
    """Return the Clopper–Pearson interval of a share of pairs."""
    from scipy.special import betaincinv

    count, tail = share * pairs, (1 - LEVEL) / 2
    low = float(betaincinv(count, pairs - count + 1, tail)) if count > 0 else 0.0
    return low, float(betaincinv(count + 1, pairs - count, 1 - tail)) if count < pairs else 1.0


def holm(found: Sequence[float]) -> list[float]:
    """Return the p values corrected for their number (Holm 1979), in the same order."""
    order, corrected, highest = np.argsort(found, kind="stable"), [1.0] * len(found), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(found) - rank) * found[place]))
        corrected[place] = highest
    return corrected


def over_seeds(values_SU: Floats, less_SU: Floats | None = None, *, floor: int | None = 0) -> Estimate:
    """Return the mean of accuracies by seed and unit, minus that of others on other units of the same seeds.

    Values of at least `floor`: 0, −1 of differences, None of numbers without bounds. Only these two have a p.
    """
    parts = [values_SU] if less_SU is None else [values_SU, -less_SU]
    units = [part.shape[1] for part in parts]
    columns = np.concatenate([part.T / count for part, count in zip(parts, units, strict=True)])
    by_seed = columns.sum(axis=0)
    spread = crossed([columns], np.repeat(np.arange(len(parts)), units))
    value = round(float(by_seed.mean()), 12)
    if floor is None:
        found = unbounded_interval(value, spread)
    else:
        floor = floor if less_SU is None else -1
        found = bounded_interval(value, spread, min(units), floor=floor, units=sum(units))
    std = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    return replace(found, p=None if floor == 0 else found.p, std=std)


def permutation_p(differences: Floats, resamples: int = PERMUTATIONS) -> float:
    """Return the two-sided p of a paired permutation test, which flips the signs of differences and compares their sum.

    Exact if there are fewer than `resamples` flips. The smallest possible p of n units is 2/2ⁿ.
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
    """Return Spearman's rank correlation; None for fewer than three pairs, or if one of the two does not vary."""
    from scipy.stats import spearmanr

    if len(first_P) < 3 or np.ptp(first_P) == 0 or np.ptp(second_P) == 0:
        return None
    return float(spearmanr(first_P, second_P).statistic)


def win_rate(differences: Sequence[float]) -> WinRate:
    """Count the differences of accuracy above and below 0; those within one point (`TIE`) are ties."""
    # Accuracies are sums of binary fractions: a difference of exactly one point may read 0.0100000000000001.
    ahead = sum(value > TIE + 1e-9 for value in differences)
    behind = sum(value < -TIE - 1e-9 for value in differences)
    return WinRate(ahead=ahead, ties=len(differences) - ahead - behind, behind=behind)


def calibration(margins_P: Floats) -> Calibration:
    """Return the reliability of σ(margin), the Bradley–Terry probability of the ranking.

    The order of the two responses is a convention, so the confidence is that of the higher-ranked response,
    σ(|margin|) ≥ ½. Bins hold equally many pairs, because implicit rewards are often all close to ½. Brier is
    the mean of (1 − σ(margin))²; guessing scores 0.25.
    """
    sorted_P = margins_P[np.argsort(np.abs(margins_P), kind="stable")]
    confidence_P = 1.0 / (1.0 + np.exp(-np.abs(sorted_P)))
    right_P = right(sorted_P, np.zeros(len(sorted_P)))
    filled = [rows for rows in np.array_split(np.arange(len(sorted_P)), BINS) if len(rows)]
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


def half_width(pairs: int) -> float:
    """Return half of the 95 % interval of an accuracy of 0.75 on so many pairs, by the normal approximation: 0.06 at 200 pairs."""
    return 1.96 * float(np.sqrt(0.75 * 0.25 / pairs))


def right(chosen_P: Floats, rejected_P: Floats) -> Floats:
    """Return 1 for each pair ranked right, ½ for a tie, else 0; the mean is the accuracy."""
    return (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)


def scaled_margins(chosen_P: Floats, rejected_P: Floats) -> Floats:
    """Return margins over the standard deviation of all 2P rewards, so that reward types can be compared."""
    spread = float(np.std(np.concatenate([chosen_P, rejected_P]), ddof=1))
    return (chosen_P - rejected_P) / spread if spread > 0 else np.zeros(len(chosen_P))


def by_decile(values_P: Floats, right_P: Floats) -> list[dict[str, Any]]:
    """Return for each tenth its number from 1, its range of values, its pairs and their accuracy.

    Equal values are all in the tenth of the first of them.
    """
    # Rank by the number of smaller values: quantiles may separate equal values.
    below_P = np.searchsorted(np.sort(values_P), values_P, side="left")
    tenth_P = below_P * 10 // len(values_P)
    return [
        {
            "decile": int(number) + 1,
            "from": float(values_P[here_P].min()),
            "to": float(values_P[here_P].max()),
            "pairs": int(here_P.sum()),
            "accuracy": over_seeds(right_P[None, here_P]),
        }
        for number in np.unique(tenth_P)
        for here_P in [tenth_P == number]
    ]
