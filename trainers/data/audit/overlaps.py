"""What an evaluation set shares with a training set, and which of its pairs training has therefore seen.

Equal means equal but for case, white space and compatible characters (Unicode NFKC). Nearly equal means a
Jaccard similarity of at least 0.8 between the sets of three consecutive words. MinHash finds candidates; the
sets themselves decide. Texts of under eight words have too few such sets and are never nearly equal.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.data.records import Pair
from trainers.data.texts import LONG

NEAR = 0.8
SHINGLE_WORDS, MIN_WORDS = 3, 8
PERMUTATIONS, SEED = 128, 1
# Bands × rows of the index: texts of similarity 0.8 share a band with probability 0.9999.
_BANDS = (25, 5)
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
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint32, len(words))
    # The factors are odd and differ, so that the order of the words counts; uint32 wraps around.
    parts = [codes[start : len(words) - SHINGLE_WORDS + 1 + start] for start in range(SHINGLE_WORDS)]
    mixed = sum(part * factor for part, factor in zip(parts, _FACTORS, strict=True))
    return np.unique(np.asarray(mixed, np.uint32))


def jaccard(left: Shingles, right: Shingles) -> float:
    """Return |A ∩ B| / |A ∪ B|; 0 where both are empty."""
    common = np.intersect1d(left, right, assume_unique=True).size
    union = left.size + right.size - common
    return float(common / union) if union else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """Rows whose text stands elsewhere, in their order: word for word, or nearly."""

    exact: tuple[int, ...]
    near: tuple[int, ...]


class TextIndex:
    """One column of a set, searchable. What a search needs is computed once, at its first use."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.numbers: list[int] = []
        self.texts: dict[str, int] = {}
        for text in texts:
            self.numbers.append(self.texts.setdefault(normalised(text), len(self.texts)))

    @cached_property
    def _shingles(self) -> list[Shingles]:
        return [shingles(text) for text in self.texts]

    @cached_property
    def _hashes(self) -> dict[int, Any]:
        from datasketch import MinHash  # type: ignore[import-untyped]

        long = [number for number, found in enumerate(self._shingles) if found.size]
        content = [self._shingles[number].tolist() for number in long]
        # Shingles are hashes already.
        sketches = MinHash.bulk(content, num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
        return dict(zip(long, sketches, strict=True))

    @cached_property
    def _lsh(self) -> Any:
        from datasketch import MinHashLSH

        buckets = MinHashLSH(num_perm=PERMUTATIONS, params=_BANDS)
        for number, sketch in self._hashes.items():
            buckets.insert(number, sketch)
        return buckets

    def repeats_of(self, other: "TextIndex") -> Repeated:
        """Return the rows of this column whose text stands in `other`."""
        exact = {number for text, number in self.texts.items() if text in other.texts}
        near = {
            number
            for number in self._hashes
            if number not in exact and any(True for _ in self._near(number, other))
        }
        return Repeated(exact=self._rows(exact), near=self._rows(near))

    def _near(self, number: int, other: "TextIndex") -> Iterable[int]:
        return (
            candidate
            for candidate in other._lsh.query(self._hashes[number])
            if jaccard(self._shingles[number], other._shingles[candidate]) >= NEAR
        )

    def _rows(self, numbers: set[int]) -> tuple[int, ...]:
        return tuple(row for row, number in enumerate(self.numbers) if number in numbers)


class IndexedPairs:
    """Pairs whose prompts, chosen and rejected responses are searchable."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.prompts = TextIndex("\n".join(turn.content for turn in pair.prompt) for pair in pairs)
        self.chosen = TextIndex(pair.chosen for pair in pairs)
        self.rejected = TextIndex(pair.rejected for pair in pairs)


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
    prompts = evaluated.prompts.repeats_of(train.prompts)
    chosen = evaluated.chosen.repeats_of(train.chosen)
    rejected = evaluated.rejected.repeats_of(train.rejected)
    crossed = evaluated.chosen.repeats_of(train.rejected).exact
    leaked = {*prompts.exact, *prompts.near}
    leaked |= {row for row in (*chosen.exact, *chosen.near) if len(pairs[row].chosen) >= LONG}
    leaked |= {row for row in (*rejected.exact, *rejected.near) if len(pairs[row].rejected) >= LONG}
    return Overlap(
        train=names[0],
        evaluated=names[1],
        pairs=len(pairs),
        prompts_exact=len(prompts.exact),
        prompts_near=len(prompts.near),
        chosen_exact=len(chosen.exact),
        chosen_near=len(chosen.near),
        rejected_exact=len(rejected.exact),
        rejected_near=len(rejected.near),
        chosen_as_rejected=sum(len(pairs[row].chosen) >= LONG for row in crossed),
        leaked=tuple(sorted(leaked)),
    )
