"""How much of a pair's responses the nearest training pair says as well: the token shift within a distribution.

A pair is the set of its distinct tokens (ids or words), each with the side it stands on: yes among the chosen is not yes
among the rejected. Overlap is Dice's coefficient, 2|A ∩ B| / (|A| + |B|).
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Overlaps held at once: 64 MB.
_BLOCK = 8_000_000

Bag = frozenset[tuple[bool, Hashable]]


class Nearest(NamedTuple):
    """By pair: its largest overlap with a training pair, 0 to 1, and which that is, the first of equals."""

    overlap: NDArray[np.float64]
    row: NDArray[np.int64]


def bag(chosen: Iterable[Hashable], rejected: Iterable[Hashable]) -> Bag:
    """The tokens of both sides."""
    return frozenset([*((True, token) for token in chosen), *((False, token) for token in rejected)])


def nearest(pairs: Sequence[Bag], trained: Sequence[Bag]) -> Nearest:
    """The nearest training pair of each; both hold at least one."""
    numbers: dict[Hashable, int] = {}
    theirs, ours = _matrix(trained, numbers, grow=True), _matrix(pairs, numbers, grow=False)
    sizes_T, sizes_P = (np.array([len(item) for item in bags], float) for bags in (trained, pairs))
    overlaps, rows = [], []
    step = max(1, _BLOCK // len(trained))
    for start in range(0, len(pairs), step):
        common = np.asarray((ours[start : start + step] @ theirs.T).todense(), dtype=np.float64)
        both = sizes_P[start : start + step, None] + sizes_T[None, :]
        dice = 2.0 * common / np.maximum(both, 1.0)
        rows.append(dice.argmax(axis=1))
        overlaps.append(dice.max(axis=1))
    return Nearest(np.concatenate(overlaps), np.concatenate(rows))


def _matrix(bags: Sequence[Bag], numbers: dict[Hashable, int], *, grow: bool) -> Any:
    """Bags × tokens, 1 where it holds one; tokens without a number are none of training's."""
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    if grow:
        for item in bags:
            for token in sorted(item, key=repr):
                numbers.setdefault(token, len(numbers))
    columns = [[numbers[token] for token in item if token in numbers] for item in bags]
    ends = np.cumsum([0, *map(len, columns)])
    flat = np.array([number for row in columns for number in row], dtype=np.int64)
    return csr_array((np.ones(len(flat)), flat, ends), shape=(len(bags), max(1, len(numbers))))
