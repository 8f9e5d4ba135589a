"""Accuracy by tenths of what a pair has: pairs of one value stay in one tenth, so that there may be fewer.

Shapes: P pairs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.report.statistics import DRAWS, Floats, accuracy_estimate, generator, pair_counts

TENTHS = 10


def decile_of(values_P: Floats) -> NDArray[np.int64]:
    """The tenth of each pair, 0 for the smallest values; equal values are in the same, that of the first of them."""
    order = np.sort(values_P)
    # By how many pairs have a smaller value, not by quantiles, which may fall between equal values.
    below_P = np.searchsorted(order, values_P, side="left")
    found: NDArray[np.int64] = (below_P * TENTHS) // len(values_P)
    return found


def by_decile(values_P: Floats, right_P: Floats) -> list[dict[str, Any]]:
    """Of each tenth that there is: its number from 1, its range of values, its pairs and their accuracy."""
    tenth_P = decile_of(values_P)
    rows = []
    for number in np.unique(tenth_P):
        here_P = tenth_P == number
        count = int(here_P.sum())
        counts_BP = pair_counts(count, DRAWS, generator("decile", str(number), str(count)))
        value, draws_B = float(right_P[here_P].mean()), counts_BP @ right_P[here_P] / count
        rows.append(
            {
                "decile": int(number) + 1,
                "from": float(values_P[here_P].min()),
                "to": float(values_P[here_P].max()),
                "pairs": count,
                "accuracy": accuracy_estimate(round(value, 12), np.round(draws_B, 12), count),
            }
        )
    return rows
