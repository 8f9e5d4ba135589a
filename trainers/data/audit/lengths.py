"""Lengths, and how many pairs length alone would rank right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# A response this long holds a sentence, and does not come about twice by chance.
LONG = 100

Unit = Literal["characters", "words", "tokens"]
_Z = 1.959963984540054


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; `successes` may hold halves (ties). (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The distribution of one column's lengths, in `unit`."""

    unit: Unit
    mean: float
    least: int
    quartile_1: float
    median: float
    quartile_3: float
    percentile_95: float
    most: int


def distribution(lengths: Sequence[int], unit: Unit) -> Lengths:
    """Of at least one length."""
    values = np.asarray(lengths)
    quantiles = np.quantile(values, [0.25, 0.5, 0.75, 0.95])
    return Lengths(
        unit=unit,
        mean=float(values.mean()),
        least=int(values.min()),
        quartile_1=float(quantiles[0]),
        median=float(quantiles[1]),
        quartile_3=float(quantiles[2]),
        percentile_95=float(quantiles[3]),
        most=int(values.max()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBaseline:
    """Accuracy of "the longer response wins", a tie counting one half, with Wilson's 95 % interval."""

    unit: Unit
    longer_wins: float
    low: float
    high: float
    pairs: int

    @property
    def shorter_wins(self) -> float:
        """Accuracy of "the shorter response wins"."""
        return 1.0 - self.longer_wins

    @property
    def better(self) -> str:
        """Which of the two rules is above one half."""
        return "longer wins" if self.longer_wins >= 0.5 else "shorter wins"

    @property
    def shortcut(self) -> float:
        """Accuracy of the better rule."""
        return max(self.longer_wins, self.shorter_wins)

    @property
    def significant(self) -> bool:
        """Whether one half is outside the interval."""
        return not self.low <= 0.5 <= self.high


def length_baseline(chosen: Sequence[int], rejected: Sequence[int], unit: Unit) -> LengthBaseline:
    """Of at least one pair."""
    right = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
    low, high = wilson(right, len(chosen))
    return LengthBaseline(unit=unit, longer_wins=right / len(chosen), low=low, high=high, pairs=len(chosen))
