"""The one shape of a preference pair, whatever it was read from."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


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


def content_digest(pairs: Iterable[Pair]) -> str:
    """Digest of what the pairs say, in order: the same for every file format they came in."""
    digest = hashlib.sha256()
    for pair in pairs:
        row = [[list(message) for message in pair.prompt], pair.chosen, pair.rejected]
        digest.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def user_prompt(text: str) -> tuple[Message, ...]:
    """A plain-text prompt as the single user turn it stands for."""
    return (Message("user", text),)


def write_pairs(pairs: Iterable[Pair], file: Path) -> None:
    """Write pairs as jsonl, one row each: [[role, content] …], chosen, rejected."""
    with file.open("w", encoding="utf-8") as lines:
        for pair in pairs:
            json.dump([pair.prompt, pair.chosen, pair.rejected], lines, ensure_ascii=False)
            lines.write("\n")


def read_written_pairs(file: Path) -> list[Pair]:
    """The pairs that `write_pairs` wrote."""
    pairs = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            prompt, chosen, rejected = json.loads(line)
            messages = tuple(Message(role, content) for role, content in prompt)
            pairs.append(Pair(prompt=messages, chosen=chosen, rejected=rejected))
    return pairs
