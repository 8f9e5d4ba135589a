"""`python -m trainers.data show NAME|PATH`: a set's first pairs, its digest, and what is remembered of its source."""

import itertools
import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from trainers.data.choosing import Reading, chosen_spec
from trainers.data.list_command import source_of
from trainers.data.records import Digest, Message, Pair, as_row
from trainers.data.sources import iter_pairs
from trainers.errors import SpecError

_WIDTH = 100
_LINES = 6


@dataclass(frozen=True, kw_only=True)
class Show:
    """Some pairs of a set, where it comes from, and the key of its content."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME|PATH")]]
    """A known name, a file, a folder or a hub id."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    split: str = "train"
    """Which split."""
    pairs: int = 2
    """How many."""
    storage: Path | None = None
    """A sweep's storage: says which revision it took of the set and which content that was."""
    json: bool = False
    """As one object."""


def run_show(arguments: Show) -> None:
    """Print pairs of the set. Raises SweepError."""
    if arguments.pairs < 0:
        raise SpecError(f"--pairs {arguments.pairs}: give a number of at least 0.")
    spec = chosen_spec(arguments.data, arguments.reading)
    left_out: list[str] = []
    digest, first = Digest(), []
    split = {"train": spec.train_split, "test": spec.test_split}.get(arguments.split, arguments.split)
    for pair in iter_pairs(spec, split, left_out):
        digest.add(pair)
        if digest.rows <= arguments.pairs:
            first.append(pair)
    facts: dict[str, Any] = {
        "name": spec.name,
        "source": source_of(spec),
        "revision": spec.revision,
        "split": arguments.split,
        "rows": digest.rows,
        "digest": digest.hexdigest(),
        "left_out": left_out,
        "remembered": [] if arguments.storage is None else remembered(arguments.storage, spec.source),
    }
    if arguments.json:
        shown = [as_row(pair) for pair in first]
        print(json.dumps({**facts, "pairs": shown}, ensure_ascii=False))
        return
    print(f"{spec.name}, split {arguments.split}: {digest.rows} pairs, content {facts['digest'][:16]}")
    print(f"from {facts['source']}" + (f" at revision {spec.revision}" if spec.revision else ""))
    for record in facts["remembered"]:
        print(
            f"in {arguments.storage}: split {record['split']} at revision {record['revision']}, "
            f"content {record['digest'][:16]}, {record['rows']} pairs"
        )
    say_left_out(left_out)
    for number, pair in enumerate(first):
        print(f"\n── {number} ──\n{_text(pair)}")


def say_left_out(left_out: list[str], most: int = 20) -> None:
    """Count and list the bad rows that were left out."""
    if not left_out:
        return
    print(f"{len(left_out)} bad rows left out:")
    for line in itertools.islice(left_out, most):
        print(f"  {line}")
    if len(left_out) > most:
        print(f"  and {len(left_out) - most} more")


def remembered(storage: Path, source: str) -> list[dict[str, Any]]:
    """What a sweep's store noted of a source when it fetched it; nothing where it never did."""
    found = []
    for file in sorted((storage / "sources").glob("*.json")):
        record = json.loads(file.read_text())
        if record.get("source") == source:
            found.append({name: record[name] for name in ("set", "split", "revision", "digest", "rows")})
    return found


def _text(pair: Pair) -> str:
    parts = [("tools", pair.tools)] if pair.tools else []
    parts += [(message.role, _said(message)) for message in pair.prompt]
    for what, turns in zip(("chosen", "rejected"), pair.responses, strict=True):
        roles = [what if len(turns) == 1 else f"{what}: {turn.role}" for turn in turns]
        parts += [(role, _said(turn)) for role, turn in zip(roles, turns, strict=True)]
    return "\n".join(f"[{what}] {_short(text)}" for what, text in parts)


def _said(turn: Message) -> str:
    return " ".join(filter(None, turn[1:]))


def _short(text: str) -> str:
    lines = [part for line in text.splitlines() for part in (textwrap.wrap(line, _WIDTH) or [""])]
    return "\n".join(lines[:_LINES]) + (" …" if len(lines) > _LINES else "")
