"""What an evaluation set shares with a training set, and which of its pairs training has therefore seen.

Equal means equal but for case, white space and compatible characters (Unicode NFKC). Nearly equal means a
Jaccard similarity of at least 0.8 between the sets of three consecutive words. MinHash finds candidates; the
sets themselves decide. An index holds a digest and 25 numbers of each text, and reads the text of
a candidate from its pair. Texts of under eight words have too few such sets and are never nearly equal.
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainers.data.records import Pair
from trainers.data.texts import LONG

NEAR = 0.8
SHINGLE_WORDS, MIN_WORDS = 3, 8
# Bands × minima in each: texts of similarity 0.8 share a band with probability 0.9999.
_BANDS = (25, 5)
# Hash functions x → (factor · x + term) mod 2⁶⁴ >> 32, and factors that fold the minima of a band into one number.
_FACTOR, _TERM = np.random.default_rng(1).integers(2**64, size=(2, 125), dtype=np.uint64)
_FOLD = np.random.default_rng(2).integers(2**64, size=_BANDS[1], dtype=np.uint64)
_FACTORS = (np.uint32(1), np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B))
_WORD = re.compile(r"\w+")

Shingles = NDArray[np.uint32]


def normalised(text: str) -> str:
    """Return `text` without case, white space and compatible characters, which do not change what it says."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> Shingles:
    """Return sorted hashes of every three consecutive words; none for a text of under eight words."""
    words = _WORD.findall(text)
    if len(words) < MIN_WORDS:
        return np.empty(0, np.uint32)
    codes = np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint32, len(words))
    # The factors are odd and differ, so that the order of the words counts; uint32 wraps around.
    parts = [codes[start : len(words) - SHINGLE_WORDS + 1 + start] for start in range(SHINGLE_WORDS)]
    mixed = sum(part * factor for part, factor in zip(parts, _FACTORS, strict=True))
    return np.unique(np.asarray(mixed, np.uint32))


def jaccard(left: Shingles, right: Shingles) -> float:
    """Return |A ∩ B| / |A ∪ B|; 0 where both are empty."""
    common = np.intersect1d(left, right, assume_unique=True).size
    union = left.size + right.size - common
    return float(common / union) if union else 0.0


class Repeated(NamedTuple):
    """Rows whose text stands elsewhere, in their order: word for word, or nearly."""

    exact: tuple[int, ...]
    near: tuple[int, ...]


class TextIndex:
    """A searchable index of one text of each item, read from the item when needed; equal texts have one number."""

    def __init__(self, items: Sequence[Any], text: Callable[[Any], str] = str) -> None:
        self._items, self._text = items, text
        self.numbers: list[int] = []
        self._known: dict[bytes, int] = {}
        self._asked: dict[int, Shingles] = {}
        # The first row of each number.
        self._rows: list[int] = []
        for row, item in enumerate(items):
            digest = hashlib.blake2b(normalised(text(item)).encode(), digest_size=16).digest()
            number = self._known.setdefault(digest, len(self._known))
            self.numbers.append(number)
            if number == len(self._rows):
                self._rows.append(row)

    def __len__(self) -> int:
        """Return how many texts differ."""
        return len(self._known)

    def _candidate(self, number: int) -> Shingles:
        """Return the shingles of a text and keep them: prompts of one template are candidates again and again."""
        if number not in self._asked:
            self._asked[number] = self._shingles(number)
        return self._asked[number]

    def _shingles(self, number: int) -> Shingles:
        return shingles(normalised(self._text(self._items[self._rows[number]])))

    @cached_property
    def _bands(self) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """The numbers of the texts that have shingles, and a number for each of their bands: texts × bands."""
        found = ((number, _banded(self._shingles(number))) for number in range(len(self)))
        kept = [(number, bands) for number, bands in found if bands is not None]
        bands = np.array([bands for _, bands in kept], np.uint64).reshape(-1, _BANDS[0])
        return np.array([number for number, _ in kept], np.uint32), bands

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """The numbers of the texts and their bands, both bands × texts, sorted by the band within each row."""
        numbers, bands = self._bands
        order = np.argsort(bands.T, axis=1, kind="stable")
        return numbers[order], np.take_along_axis(bands.T, order, axis=1)

    def repeats_of(self, other: "TextIndex") -> Repeated:
        """Return the rows of this column whose text stands in `other`."""
        exact = {number for text, number in self._known.items() if text in other._known}
        near = {
            number
            for number, bands in zip(*self._bands, strict=True)
            if number not in exact and self._is_near(number, bands, other)
        }
        return Repeated(exact=self._rows_of(exact), near=self._rows_of(near))

    def _is_near(self, number: int, bands: NDArray[np.uint64], other: "TextIndex") -> bool:
        numbers, columns = other._sorted
        candidates: set[int] = set()
        for band, column, value in zip(numbers, columns, bands, strict=True):
            start = column.searchsorted(value)
            candidates.update(band[start : column.searchsorted(value, "right")].tolist())
        if not candidates:
            return False
        own = self._shingles(number)
        return any(jaccard(own, other._candidate(candidate)) >= NEAR for candidate in candidates)

    def _rows_of(self, numbers: set[int]) -> tuple[int, ...]:
        return tuple(row for row, number in enumerate(self.numbers) if number in numbers)


def _banded(found: Shingles) -> NDArray[np.uint64] | None:
    """Return a number for each band of the MinHash of a text's shingles; None without shingles."""
    if not found.size:
        return None
    hashes = (found[:, None].astype(np.uint64) * _FACTOR + _TERM) >> np.uint64(32)
    bands: NDArray[np.uint64] = (hashes.min(axis=0).reshape(_BANDS) * _FOLD).sum(axis=1, dtype=np.uint64)
    return bands


class IndexedPairs:
    """Pairs whose prompts, chosen and rejected responses are searchable."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.prompts = TextIndex(pairs, lambda pair: "\n".join(turn.content for turn in pair.prompt))
        self.chosen = TextIndex(pairs, lambda pair: pair.chosen)
        self.rejected = TextIndex(pairs, lambda pair: pair.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How many pairs of the evaluation set have texts that stand in the training split, drawn or not.

    `leaked` are the rows that training has seen: their prompt stands there, word for word or nearly, or one
    of their responses of at least 100 characters does.
    """

    train: str
    evaluated: str
    pairs: int
    prompts_exact: int
    prompts_near: int
    chosen_exact: int
    chosen_near: int
    rejected_exact: int
    rejected_near: int
    chosen_as_rejected: int
    leaked: tuple[int, ...]


def overlap(train: IndexedPairs, evaluated: IndexedPairs, *, names: tuple[str, str]) -> Overlap:
    """Compare a training set with an evaluation set; `names` are those of the two."""
    pairs = evaluated.pairs
    columns = ("prompts", "chosen", "rejected")
    found = {name: getattr(evaluated, name).repeats_of(getattr(train, name)) for name in columns}
    leaked = {*found["prompts"].exact, *found["prompts"].near}
    for side in columns[1:]:
        rows = (*found[side].exact, *found[side].near)
        leaked |= {row for row in rows if len(getattr(pairs[row], side)) >= LONG}
    crossed = evaluated.chosen.repeats_of(train.rejected).exact
    return Overlap(
        train=names[0],
        evaluated=names[1],
        pairs=len(pairs),
        **{f"{name}_exact": len(repeated.exact) for name, repeated in found.items()},
        **{f"{name}_near": len(repeated.near) for name, repeated in found.items()},
        chosen_as_rejected=sum(len(pairs[row].chosen) >= LONG for row in crossed),
        leaked=tuple(sorted(leaked)),
    )
