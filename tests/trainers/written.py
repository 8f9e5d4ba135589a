"""Pairs as one digest, and as a file of the store."""

from collections.abc import Iterable
from pathlib import Path

from trainers.data.records import Digest, Pair, written


def content_digest(pairs: Iterable[Pair]) -> str:
    """Return the digest of all the pairs."""
    digest = Digest()
    for pair in pairs:
        digest.add(pair)
    return digest.hexdigest()


def write_pairs(pairs: Iterable[Pair], file: Path) -> None:
    """Write all the pairs to `file`, for `read_written_pairs`."""
    for _ in written(pairs, file):
        pass
