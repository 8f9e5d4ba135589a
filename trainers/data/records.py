"""The one shape of a preference pair, whatever it was read from."""

import array
import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload


class Message(NamedTuple):
    """One chat turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt with a preferred and a dispreferred response (paper §2).

    `original_chosen` is set where the set declares itself a rewriting: the text it rewrites.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    original_chosen: str | None = None


class Digest:
    """Digest of what pairs say, in order: the same for every file format they came in. `rows` counts them."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.rows = 0

    def add(self, pair: Pair) -> None:
        """Take the next pair in."""
        row = [[list(message) for message in pair.prompt], pair.chosen, pair.rejected]
        self._digest.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode())
        self._digest.update(b"\n")
        self.rows += 1

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._digest.hexdigest()


def content_digest(pairs: Iterable[Pair]) -> str:
    """`Digest` of all the pairs."""
    digest = Digest()
    for pair in pairs:
        digest.add(pair)
    return digest.hexdigest()


def user_prompt(text: str) -> tuple[Message, ...]:
    """A plain-text prompt as the single user turn it stands for."""
    return (Message("user", text),)


def write_pairs(pairs: Iterable[Pair], file: Path) -> None:
    """Write pairs as jsonl, one row each: [[role, content] …], chosen, rejected."""
    for _ in written(pairs, file):
        pass


def written(pairs: Iterable[Pair], file: Path | None) -> Iterator[Pair]:
    """The pairs, each handed on when it stands in `file` (None: nowhere), in the form of `write_pairs`."""
    if file is None:
        yield from pairs
        return
    with file.open("w", encoding="utf-8") as lines:
        for pair in pairs:
            lines.write(json.dumps([pair.prompt, pair.chosen, pair.rejected], ensure_ascii=False))
            lines.write("\n")
            yield pair


class WrittenPairs(Sequence[Pair]):
    """The pairs that `write_pairs` wrote, each parsed from the mapped file when it is asked for."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            if not file.stat().st_size:
                self._lines: mmap.mmap | bytes = b""
            else:
                self._lines = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = array.array("Q")
        end = self._lines.find(b"\n")
        while end >= 0:
            self._ends.append(end)
            end = self._lines.find(b"\n", end + 1)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> list[Pair]: ...
    def __getitem__(self, place: int | slice) -> Pair | list[Pair]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        start = self._ends[number - 1] + 1 if number else 0
        prompt, chosen, rejected = json.loads(self._lines[start : self._ends[number]])
        messages = tuple(Message(role, content) for role, content in prompt)
        return Pair(prompt=messages, chosen=chosen, rejected=rejected)


def read_written_pairs(file: Path) -> Sequence[Pair]:
    """The pairs that `write_pairs` wrote."""
    return WrittenPairs(file)
