"""The digest of pairs in their order."""

from collections.abc import Iterable

from trainers.data.records import Digest, Pair


def content_digest(pairs: Iterable[Pair]) -> str:
    """Return the digest of all the pairs."""
    digest = Digest()
    for pair in pairs:
        digest.add(pair)
    return digest.hexdigest()
