"""A preference pair, whatever it was read from; the digest of pairs; and pairs written to a file and read back."""

import array
import hashlib
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# What a turn says beside its content. Its other fields are notes, which a template may use.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
SAYING_FIELDS = ("tool_calls", "function_call", *REASONING_FIELDS)

# Columns of a prepared set: where a pair stands in its suite, and whether its responses are rated alike.
PLACE, TIE = "place_in_suite", "rated_alike"

_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Message(NamedTuple):
    """One chat turn. `fields` is a JSON object of what it holds beside role and content, such as tool_calls."""

    role: str
    content: str
    fields: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        # A note may be called content, beside words that were called value.
        said = {"role": self.role, "content": self.content}
        return {**said, **json.loads(self.fields), **said} if self.fields else said

    def said_in_fields(self) -> dict[str, Any]:
        """Return the fields that say something, without notes such as ids and counts."""
        fields = json.loads(self.fields) if self.fields else {}
        return {name: value for name, value in fields.items() if name in SAYING_FIELDS}


class Candidates(NamedTuple):
    """Where the two responses of a pair stand among the answers to one prompt of an evaluation suite.

    `item` is the suite's own name of the prompt, `number` counts prompts; of its `right` and `wrong` answers,
    `chosen` and `rejected` are the numbers of these two.
    """

    suite: str
    item: str
    number: int
    subset: str
    group: str
    right: int
    wrong: int
    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt with a preferred and a dispreferred response (paper §2).

    `chosen` and `rejected` are the texts of the responses. A response that is more than one plain assistant
    turn also has its turns in `chosen_turns` or `rejected_turns`. `tools` is a JSON list of the tools that
    the conversation could call. `margin` says by how much chosen is better, where the data do. `original_chosen` is the
    text that `chosen` rewrites, where the set declares that it rewrites another. `candidates` is the pair's place in a suite.
    `rewritten` are the two responses in other words, where the data have them. Of a `tie` neither response is preferred.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_turns: tuple[Message, ...] = ()
    rejected_turns: tuple[Message, ...] = ()
    tools: str = ""
    margin: float | None = None
    original_chosen: str | None = None
    candidates: Candidates | None = None
    rewritten: tuple[str, str] | None = None
    tie: bool = False

    @property
    def responses(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        return (
            self.chosen_turns or (Message("assistant", self.chosen),),
            self.rejected_turns or (Message("assistant", self.rejected),),
        )


def user_prompt(text: str) -> tuple[Message, ...]:
    """Return a plain-text prompt as one user turn."""
    return (Message("user", text),)


def as_row(pair: Pair) -> dict[str, Any]:
    """Return the pair as a JSON row: the prompt as messages, a response as text unless it has turns."""
    row: dict[str, Any] = {
        "prompt": [turn.as_dict() for turn in pair.prompt],
        "chosen": [turn.as_dict() for turn in pair.chosen_turns] or pair.chosen,
        "rejected": [turn.as_dict() for turn in pair.rejected_turns] or pair.rejected,
    }
    more = {
        "tools": pair.tools or None,
        "margin": pair.margin,
        TIE: pair.tie or None,
        "orig_chosen": pair.original_chosen,
        PLACE: pair.candidates and pair.candidates._asdict(),
        **dict(zip(("rewritten_chosen", "rewritten_rejected"), pair.rewritten or (), strict=False)),
    }
    return row | {name: value for name, value in more.items() if value is not None}


class Digest:
    """The digest of pairs in their order: the same for every file format.

    It counts `rows`, and those without a margin or a rewriting.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.rows = self.without_margin = self.without_rewriting = 0

    def add(self, pair: Pair) -> None:
        self._digest.update(_COMPACT.encode(_listed(pair)).encode() + b"\n")
        self.rows += 1
        self.without_margin += pair.margin is None
        self.without_rewriting += pair.rewritten is None

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def listed_turns(messages: Sequence[Message]) -> list[list[str]]:
    """Return turns as JSON values: [role, content], or [role, content, fields]."""
    return [[*turn] if turn.fields else [turn.role, turn.content] for turn in messages]


def _listed(pair: Pair) -> list[Any]:
    """Return the pair as JSON values. Fields that most pairs lack come last and end with the last one that is set."""
    more: list[Any] = [listed_turns(pair.chosen_turns), listed_turns(pair.rejected_turns), pair.tools]
    more += [pair.margin, pair.candidates, pair.rewritten, pair.tie or None]
    there = [number for number, value in enumerate(more, 1) if value not in ([], "", None)]
    # Turns and tools stand together.
    kept = max(3, *there) if there else 0
    return [listed_turns(pair.prompt), pair.chosen, pair.rejected, *more[:kept]]


def written(pairs: Iterable[Pair], file: Path | None) -> Iterator[Pair]:
    """Yield the pairs, each after it was written to `file` as a line of JSON (None: write nothing)."""
    if file is None:
        yield from pairs
        return
    with file.open("w", encoding="utf-8") as lines:
        for pair in pairs:
            lines.write(json.dumps(_listed(pair), ensure_ascii=False) + "\n")
            yield pair


def write_pairs(pairs: Iterable[Pair], file: Path) -> None:
    """Write all the pairs to `file`, for `read_written_pairs`."""
    for _ in written(pairs, file):
        pass


def read_written_pairs(file: Path) -> Sequence[Pair]:
    """Return the pairs of a file that `written` wrote, each parsed from the mapped file when it is asked for."""
    return _WrittenPairs(file)


class _WrittenPairs(Sequence[Pair]):
    def __init__(self, file: Path) -> None:
        self._lines: mmap.mmap | bytes = b""
        if file.stat().st_size:
            with file.open("rb") as stream:
                self._lines = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = array.array("Q", (found.start() for found in re.finditer(b"\n", self._lines)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        start = self._ends[number - 1] + 1 if number else 0
        prompt, chosen, rejected, *more = json.loads(self._lines[start : self._ends[number]])
        there: list[Any] = [*more, *([], [], "", None, None, None, None)[len(more) :]]
        *sides, tools, margin, candidates, rewritten, tie = there
        turns = [tuple(Message(*turn) for turn in side) for side in (prompt, *sides)]
        return Pair(
            prompt=turns[0],
            chosen=chosen,
            rejected=rejected,
            chosen_turns=turns[1],
            rejected_turns=turns[2],
            tools=tools,
            margin=margin,
            candidates=candidates and Candidates(*candidates),
            rewritten=rewritten and tuple(rewritten),
            tie=bool(tie),
        )
