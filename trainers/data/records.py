"""The one shape of a preference pair, whatever it was read from."""

import array
import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

# What a turn says beside its content; its other fields are notes, which a template may use.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
SAYING_FIELDS = ("tool_calls", "function_call", *REASONING_FIELDS)

_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Message(NamedTuple):
    """One chat turn.

    `fields` is a JSON object of what it holds beside its role and content, such as tool_calls or reasoning_content.
    """

    role: str
    content: str
    fields: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        # A note may be called content, beside words that were called value.
        said = {"role": self.role, "content": self.content}
        return {**said, **json.loads(self.fields), **said} if self.fields else said

    def said_in_fields(self) -> dict[str, Any]:
        """Return the fields that say something, without notes such as ids and counts."""
        fields = json.loads(self.fields) if self.fields else {}
        return {name: value for name, value in fields.items() if name in SAYING_FIELDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt with a preferred and a dispreferred response (paper §2).

    `chosen` and `rejected` are what the responses say. A response that is more than one plain assistant turn has its
    turns in `chosen_turns` or `rejected_turns`, and its text is what these say. `tools` is a JSON list of the tools
    that the conversation could call. `original_chosen` is set where the set declares itself a rewriting: the text it
    rewrites.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_turns: tuple[Message, ...] = ()
    rejected_turns: tuple[Message, ...] = ()
    tools: str = ""
    original_chosen: str | None = None

    @property
    def responses(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """The turns of the chosen and of the rejected response."""
        return (
            self.chosen_turns or (Message("assistant", self.chosen),),
            self.rejected_turns or (Message("assistant", self.rejected),),
        )


def is_plain(pair: Pair) -> bool:
    """Whether role and content of its prompt and the text of its responses are all that the pair says."""
    return not (
        pair.chosen_turns or pair.rejected_turns or pair.tools or any(turn.fields for turn in pair.prompt)
    )


def as_row(pair: Pair) -> dict[str, Any]:
    """The pair as a row of a file: its prompt as messages, its responses as text where they are no more than that."""
    row: dict[str, Any] = {"prompt": [message.as_dict() for message in pair.prompt]}
    for name, text, turns in (
        ("chosen", pair.chosen, pair.chosen_turns),
        ("rejected", pair.rejected, pair.rejected_turns),
    ):
        row[name] = [message.as_dict() for message in turns] or text
    return {**row, **({"tools": pair.tools} if pair.tools else {})}


def as_turns(pair: Pair) -> dict[str, Any]:
    """The pair as a row of a parquet file, whose columns have one type: responses as turns, and fields as JSON text."""
    named = zip(("prompt", "chosen", "rejected"), (pair.prompt, *pair.responses), strict=True)
    return {**{name: [turn._asdict() for turn in turns] for name, turns in named}, "tools": pair.tools}


class Digest:
    """Digest of what pairs say, in order: the same for every file format they came in. `rows` counts them."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.rows = 0

    def add(self, pair: Pair) -> None:
        """Take the next pair in."""
        self._digest.update(_COMPACT.encode(_listed(pair)).encode())
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
    """Write pairs as jsonl, a row each: prompt, chosen, rejected, and where there are any chosen_turns, rejected_turns, tools."""
    for _ in written(pairs, file):
        pass


def written(pairs: Iterable[Pair], file: Path | None) -> Iterator[Pair]:
    """The pairs, each handed on when it stands in `file` (None: nowhere), in the form of `write_pairs`."""
    if file is None:
        yield from pairs
        return
    with file.open("w", encoding="utf-8") as lines:
        for pair in pairs:
            lines.write(json.dumps(_listed(pair), ensure_ascii=False))
            lines.write("\n")
            yield pair


def _listed(pair: Pair) -> list[Any]:
    """What a pair says as JSON values; the fields that few pairs have stand in the rows of those alone."""
    row: list[Any] = [listed_turns(pair.prompt), pair.chosen, pair.rejected]
    if pair.chosen_turns or pair.rejected_turns or pair.tools:
        row += [listed_turns(pair.chosen_turns), listed_turns(pair.rejected_turns), pair.tools]
    return row


def listed_turns(messages: Sequence[Message]) -> list[list[str]]:
    """Turns as JSON values, [role, content] and [role, content, fields]."""
    return [[*message] if message.fields else [message.role, message.content] for message in messages]


def _messages(turns: Sequence[Sequence[str]]) -> tuple[Message, ...]:
    return tuple(Message(*turn) for turn in turns)


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
        prompt, chosen, rejected, *more = json.loads(self._lines[start : self._ends[number]])
        chosen_turns, rejected_turns, tools = more or ((), (), "")
        return Pair(
            prompt=_messages(prompt),
            chosen=chosen,
            rejected=rejected,
            chosen_turns=_messages(chosen_turns),
            rejected_turns=_messages(rejected_turns),
            tools=tools,
        )


def read_written_pairs(file: Path) -> Sequence[Pair]:
    """The pairs that `write_pairs` wrote."""
    return WrittenPairs(file)
