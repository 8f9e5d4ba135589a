"""Texts that stand in two places, word for word or nearly so: MinHash finds candidates, their shingles decide.

Equal means equal but for case, white space and compatible characters (Unicode NFKC). Nearly equal means a Jaccard
similarity of at least 0.8 between the sets of three consecutive words; texts under eight words have too few to tell.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

NEAR = 0.8
SHINGLE_WORDS = 3
MIN_WORDS = 8
PERMUTATIONS = 128
SEED = 1
# Bands × rows of the index: texts of similarity 0.8 share a band with probability 0.9999.
_BANDS = (25, 5)
_FACTORS = (np.uint32(1), np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B))
_WORD = re.compile(r"\w+")

Shingles = NDArray[np.uint32]


def normalised(text: str) -> str:
    """`text` without what does not change what it says: case, white space, compatible characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> Shingles:
    """Sorted hashes of every three consecutive words; none for a text of under eight words."""
    words = _WORD.findall(text)
    if len(words) < MIN_WORDS:
        return np.empty(0, np.uint32)
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint32, len(words))
    # Odd factors apart, so that the order of the words counts; uint32 wraps around.
    parts = [codes[start : len(words) - SHINGLE_WORDS + 1 + start] for start in range(SHINGLE_WORDS)]
    mixed = sum(part * factor for part, factor in zip(parts, _FACTORS, strict=True))
    return np.unique(np.asarray(mixed, np.uint32))


def jaccard(left: Shingles, right: Shingles) -> float:
    """|A ∩ B| / |A ∪ B|; 0 where both are empty."""
    common = np.intersect1d(left, right, assume_unique=True).size
    union = left.size + right.size - common
    return float(common / union) if union else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """Rows whose text stands elsewhere, in their order: word for word, or nearly."""

    exact: tuple[int, ...]
    near: tuple[int, ...]

    @property
    def rows(self) -> frozenset[int]:
        """Either."""
        return frozenset((*self.exact, *self.near))


class TextIndex:
    """One column of a set, searchable; what each search needs is computed once, on first use."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.numbers: list[int] = []
        self.texts: dict[str, int] = {}
        for text in texts:
            self.numbers.append(self.texts.setdefault(normalised(text), len(self.texts)))

    @cached_property
    def _shingles(self) -> list[Shingles]:
        return [shingles(text) for text in self.texts]

    @cached_property
    def _hashes(self) -> "dict[int, MinHash]":
        from datasketch import MinHash  # type: ignore[import-untyped]

        long = [number for number, found in enumerate(self._shingles) if found.size]
        content = [self._shingles[number].tolist() for number in long]
        # Shingles are hashes already.
        sketches = MinHash.bulk(content, num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
        return dict(zip(long, sketches, strict=True))

    @cached_property
    def _lsh(self) -> "MinHashLSH":
        from datasketch import MinHashLSH  # type: ignore[import-untyped]

        buckets = MinHashLSH(num_perm=PERMUTATIONS, params=_BANDS)
        for number, sketch in self._hashes.items():
            buckets.insert(number, sketch)
        return buckets

    def repeats_of(self, other: "TextIndex") -> Repeated:
        """Rows of this column whose text stands in `other`."""
        exact = {number for text, number in self.texts.items() if text in other.texts}
        near = {
            number
            for number, sketch in self._hashes.items()
            if number not in exact and self._is_near(number, sketch, other)
        }
        return Repeated(exact=self._rows(exact), near=self._rows(near))

    def _is_near(self, number: int, sketch: "MinHash", other: "TextIndex") -> bool:
        return any(
            jaccard(self._shingles[number], other._shingles[candidate]) >= NEAR
            for candidate in other._lsh.query(sketch)
        )

    def _rows(self, numbers: set[int]) -> tuple[int, ...]:
        return tuple(row for row, number in enumerate(self.numbers) if number in numbers)

    def repeats(self) -> Repeated:
        """Rows whose text stands in an earlier row of this column."""
        first: dict[int, int] = {}
        exact = [row for row, number in enumerate(self.numbers) if first.setdefault(number, row) != row]
        near = {
            number
            for number, sketch in self._hashes.items()
            if any(
                candidate < number and jaccard(self._shingles[number], self._shingles[candidate]) >= NEAR
                for candidate in self._lsh.query(sketch)
            )
        }
        return Repeated(exact=tuple(exact), near=tuple(sorted(first[number] for number in near)))


def index_columns(columns: Sequence[Iterable[str]]) -> tuple[TextIndex, ...]:
    """An index of each column."""
    return tuple(TextIndex(column) for column in columns)
