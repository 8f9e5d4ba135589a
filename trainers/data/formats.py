"""Files of rows, and the preference pair that a row holds.

Files are parquet, jsonl, csv, Arrow, or one JSON array, and are streamed. Rows are counted from 0, blank
lines of jsonl too. A row is in one of the formats that TRL documents:

    prompt, chosen, rejected     each as text, or as chat messages ({role, content, …}; also {from, value})
                                 a prompt in text may be the beginning of an hh-rlhf transcript, up to `Assistant:`
    chosen, rejected             conversations: the turns that both begin with are the prompt
    chosen, rejected             texts: transcripts are conversations; of others, the prompt is the whole words that
                                 both begin with
    system, tools                belong to the prompt

Where the prompt ends: the turns of chosen and rejected follow those of the prompt column, the last of which
they may repeat. Where the two sides differ in their last turn only, that turn is scored and the turns before
it belong to the prompt. Otherwise all turns after the prompt column are scored; without a prompt column, all
turns after those that both sides begin with. A prompt ends in a user's or a tool's turn, a response in the
assistant's.

What a turn has beside its role and content (tool_calls, reasoning_content, name, …) is kept as JSON in its
own order, because a chat template prints it in that order. A bad row is a DataError in the row's place, so
that a reader may raise it or leave the row out; a file that cannot be read at all is a DataError that is
raised.
"""

import csv
import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from trainers.data.records import Message, Pair, user_prompt
from trainers.errors import DataError
from trainers.specs import COLUMNS, DatasetSpec

ENDINGS = (".parquet", ".jsonl", ".csv", ".arrow", ".json")
# Far beyond what any model reads: a longer text is a damaged file, or would be tokenised for minutes and then left out.
MAX_CHARACTERS = 500_000
# The names that data sets use for the roles, in any case of letters.
ROLES = {
    name: role
    for role, names in {
        "system": ("system", "developer"),
        "user": ("user", "human", "prompter"),
        "assistant": ("assistant", "gpt", "model", "bot", "ai", "chatbot", "chatgpt", "bard", "claude"),
        "tool": ("tool", "function", "observation", "ipython"),
    }.items()
    for name in names
}
Row = dict[str, Any]
Turns = tuple[Message, ...]

_BATCH_ROWS = 1024
_BOM = b"\xef\xbb\xbf"
# A cell that is meant as chat messages, even where it is not JSON but what Python prints.
_MESSAGES = re.compile(r"""(\[\s*)?\{\s*(['"])(role|content|from|value)\2\s*:.*\}\s*\]?""", re.DOTALL)
# JSON with these names is a turn; JSON such as {"from": "Rome", "to": "Milan"} is an answer.
_TURNS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
# The names of a prompt column where no column map names it.
_PROMPTS = ("prompt", "question")
# Other columns that may hold the prompt: rows with one of them are not texts without a prompt.
_LIKE_PROMPTS = ("instruction", "query", "problem", "conversation", "conversations", "messages", "dialogue")
# Columns that hold a part of what was asked and are not read. Columns of any other name are notes on a row.
_NOT_READ = ("system_prompt", "history", "context", "input", "documents", "chat_template_kwargs")
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ANSWERS = re.compile(r"(?:\A|\n)(?:Assistant|Bot|AI):")
_SPEAKER = "Human|User|Assistant|System|Bot|AI"
_BEGINS_WITH_SPEAKER = re.compile(rf"\s*(?:{_SPEAKER}):")
_OF_HH_RLHF = re.compile(r"\s*Human:.*?\n\nAssistant:", re.DOTALL)
_BY_LINES = re.compile(rf"(?:\A\s*|\n)({_SPEAKER}):")
_BY_PARAGRAPHS = re.compile(rf"(?:\A\s*|\n\n)({_SPEAKER}):")


class _Fault(Exception):
    """What is wrong with a row, before its file and number are added."""


class Located(NamedTuple):
    """A row with its file (or hub split) and its number there; `row` is the error where the row is bad."""

    file: str
    number: int
    row: Union[Row, DataError]

    @property
    def where(self) -> str:
        """The file and the number, for messages."""
        return f"{self.file}, row {self.number}"


# Files → rows.


def file_rows(file: Path, needed: Sequence[str] = ()) -> Iterator[Located]:
    """Yield the rows of one file. Raises DataError where it cannot be read or lacks one of the `needed` columns."""
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _arrow_rows,
        ".arrow": _arrow_rows,
    }
    if file.suffix not in readers:
        raise DataError(f"{file}: {file.suffix or 'no ending'} is not read; use {', '.join(ENDINGS)}.")
    name = str(file)
    for number, row in readers[file.suffix](file, needed):
        if isinstance(row, _Fault):
            yield Located(name, number, DataError(f"{name}, row {number}: {row}"))
        else:
            yield Located(name, number, row)


_Numbered = Iterator[tuple[int, Union[Row, _Fault]]]


def _missing_column(name: str, found: Sequence[str]) -> str:
    return (
        f"no column {name!r}; needed are prompt, chosen, rejected; found {', '.join(found)}. "
        "Say which is which with a column map (prompt=…, chosen=…, rejected=…)."
    )


def _require_columns(names: Sequence[str], needed: Sequence[str], file: Path) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"{file}: column {twice[0]!r} stands twice; keep one.")
    for name in needed:
        if name not in names:
            raise DataError(f"{file}: {_missing_column(name, names)}")


def _arrow_rows(file: Path, needed: Sequence[str]) -> _Numbered:
    import pyarrow as pa

    number = 0
    try:
        names, batches = _arrow_batches(file)
        _require_columns(names, needed, file)
        for whole in batches:
            for start in range(0, whole.num_rows, _BATCH_ROWS):
                for row in _batch_rows(whole.slice(start, _BATCH_ROWS)):
                    yield number, row
                    number += 1
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        said = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(f"{file} cannot be read as {file.suffix[1:]}: {said}") from error


def _arrow_batches(file: Path) -> tuple[list[str], Iterator[Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    if file.suffix == ".parquet":
        table = parquet.ParquetFile(file, memory_map=True)
        return table.schema_arrow.names, table.iter_batches(batch_size=_BATCH_ROWS)
    mapped = pa.memory_map(str(file))
    with file.open("rb") as stream:
        is_stream = stream.read(6) != b"ARROW1"
    if is_stream:
        batches = pa.ipc.open_stream(mapped)
        return batches.schema.names, iter(batches)
    reader = pa.ipc.open_file(mapped)
    return reader.schema.names, (reader.get_batch(n) for n in range(reader.num_record_batches))


def _batch_rows(batch: Any) -> Iterator[Union[Row, _Fault]]:
    import pyarrow as pa

    try:
        # Without this check, offsets that lead out of a column's buffer would be followed.
        batch.validate(full=True)
        rows = batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if "offset" in str(error).lower():
            raise
        rows = [_single_row(batch.slice(n, 1)) for n in range(batch.num_rows)]
    for row in rows:
        yield row if isinstance(row, _Fault) else without_nulls(row)


def _single_row(batch: Any) -> Union[Row, _Fault]:
    """Return the only row of a batch, read column by column so that a fault names its column."""
    import pyarrow as pa

    row: Row = {}
    for name in batch.schema.names:
        column = batch.column(name)
        try:
            column.validate(full=True)
            row[name] = column[0].as_py()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            said = str(error).splitlines()[0].removeprefix("Invalid: ").removesuffix(" at string index 0")
            return _Fault(f"column {name!r}: {said}.")
    return row


def without_nulls(row: Row) -> Row:
    """Return the row without nulls in nested values: Arrow adds them to give all values of a column the same names."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(item) for name, item in value.items() if item is not None}
        return [filled(item) for item in value] if isinstance(value, list) else value

    return {name: filled(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}


def _jsonl_rows(file: Path, needed: Sequence[str]) -> _Numbered:
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield number, _json_row(line.removeprefix(_BOM))


def _json_rows(file: Path, needed: Sequence[str]) -> _Numbered:
    """Yield the rows of one JSON array; a file that does not begin with a bracket is read as jsonl."""
    text = file.read_bytes().removeprefix(_BOM)
    if not text.lstrip().startswith(b"["):
        yield from _jsonl_rows(file, needed)
        return
    try:
        rows = _DECODER.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    for number, row in enumerate(rows):
        yield number, row if isinstance(row, dict) else _no_object(row)


def _json_row(line: bytes) -> Union[Row, _Fault]:
    try:
        row = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return _Fault(f"byte {error.object[error.start]:#x} at {error.start} is no UTF-8.")
    # A ValueError is broken JSON, a name that stands twice, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        return _Fault(f"cannot be read as JSON: {error}")
    return row if isinstance(row, dict) else _no_object(row)


def _no_object(row: Any) -> _Fault:
    return _Fault(f"expected an object, found {type(row).__name__}.")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object. Raises ValueError where a name stands twice, because either value may be meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _csv_rows(file: Path, needed: Sequence[str]) -> _Numbered:
    # csv's own limit of 128 KiB a cell is lifted; `text_of` has ours.
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no UTF-8 become lone surrogates, which `text_of` refuses with the row.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader, number = csv.reader(stream, strict=True), 0
        try:
            names = next(reader, [])
            _require_columns(names, needed, file)
            for number, cells in enumerate(reader):
                if cells and len(cells) != len(names):
                    yield number, _Fault(f"{len(cells)} cells under {len(names)} column names.")
                elif cells:
                    yield number, _csv_row(dict(zip(names, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{file} cannot be read as csv, after row {number}: {error}.") from error


def _csv_row(row: Row) -> Union[Row, _Fault]:
    """Return the row with chat messages parsed: in a csv file they are JSON text."""
    for name, cell in row.items():
        if not cell.lstrip().startswith(("[", "{")):
            continue
        try:
            found = _DECODER.decode(cell)
        except (ValueError, RecursionError) as error:
            if _MESSAGES.fullmatch(cell.strip()):
                return _Fault(f"column {name!r} begins as chat messages, and is no JSON: {error}")
            continue
        turns = found if isinstance(found, list) else [found]
        if turns and all(isinstance(turn, dict) and any(turn.keys() >= t for t in _TURNS) for turn in turns):
            row[name] = found
    return row


# A row → a pair.


def prompt_column(row: Row, spec: DatasetSpec) -> str | None:
    """Return the prompt column of a split whose first row this is; None where both sides begin with the prompt."""
    mapped = dict(spec.columns).get("prompt")
    return mapped or next((name for name in _PROMPTS if name in row), None)


def pair_of(located: Located, spec: DatasetSpec, asked: str | None) -> Pair:
    """Return the pair that a row holds; `asked` is the `prompt_column` of its split. Raises DataError."""
    if isinstance(located.row, DataError):
        raise located.row
    try:
        return _pair_of(located.row, spec, asked)
    except _Fault as fault:
        raise DataError(f"{located.where}: {fault}") from fault


def located_text(located: Located, column: str) -> str:
    """Return the text in a column of a row. Raises DataError."""
    if isinstance(located.row, DataError):
        raise located.row
    try:
        return _text_of(located.row.get(column), column)
    except _Fault as fault:
        raise DataError(f"{located.where}: {fault}") from fault


@functools.cache
def _called(columns: tuple[tuple[str, str], ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the column of each meaning, and the columns that the map names."""
    return {meaning: meaning for meaning in COLUMNS} | dict(columns), tuple(column for _, column in columns)


def _pair_of(row: Row, spec: DatasetSpec, asked: str | None) -> Pair:
    called, mapped = _called(spec.columns)
    columns = called["chosen"], called["rejected"]
    for name in (*columns, asked, *mapped):
        if name not in row and name is not None:
            raise _Fault(_missing_column(name, list(row)))
    if asked != "prompt" and (found := prompt_column(row, spec)) != asked:
        raise _Fault(f"has a column {found!r}, which the split's first row lacks.")
    for name in (*_NOT_READ, *_NOT_TEXT):
        if row.get(name) and name not in mapped:
            how = f"map it (--columns prompt={name} or system={name}), put it into the prompt, or drop it"
            how = "only text is read; drop it" if name in _NOT_TEXT else how
            raise _Fault(f"column {name!r} is part of what was asked; {how}.")
    before: Turns = ()
    if asked is not None:
        before, sides = _after_prompt(row, columns, asked)
    elif all(isinstance(row[name], str) for name in columns):
        before, sides = _shared_texts(row, columns)
    else:
        sides = [_turns(row[name], "assistant", name) for name in columns]
        if all(turn.role in ("assistant", "tool") for side in sides for turn in side):
            raise _Fault(_missing_column("prompt", list(row)))
    prompt, chosen, rejected = _divided(before, sides, columns)
    original = row.get(called["orig_chosen"])
    return Pair(
        prompt=_with_system(prompt, row, called["system"]),
        chosen="\n\n".join(turn.content or turn.fields for turn in chosen),
        rejected="\n\n".join(turn.content or turn.fields for turn in rejected),
        chosen_turns=_unless_plain(chosen),
        rejected_turns=_unless_plain(rejected),
        tools=_tools(row.get(called["tools"]), called["tools"]),
        original_chosen=_text_of(original, "orig_chosen") if isinstance(original, str) and original else None,
    )


def _after_prompt(row: Row, columns: Sequence[str], asked: str) -> tuple[Turns, list[Turns]]:
    """Return the turns of the prompt column and of both sides, without the prompt where a transcript repeats it."""
    text, said = row[asked], [row[name] for name in columns]
    before: Turns | None = None
    if isinstance(text, str) and _OF_HH_RLHF.match(text):
        start = text.rstrip().removesuffix("\n\nAssistant:")
        if start != text.rstrip():
            before = _split(start, _BY_PARAGRAPHS, asked)
            said = [s.removeprefix(text.rstrip()).strip() if isinstance(s, str) else s for s in said]
    sides = [_turns(side, "assistant", name) for side, name in zip(said, columns, strict=True)]
    return before or _turns(text, "user", asked), sides


def _shared_texts(row: Row, columns: Sequence[str]) -> tuple[Turns, list[Turns]]:
    """Return the prompt that two texts begin with and the rest of each, or the turns of two transcripts."""
    texts = [_text_of(row[name], name) for name in columns]
    if any(row.get(name) for name in _LIKE_PROMPTS):
        raise _Fault(_missing_column("prompt", list(row)))
    if all(_BEGINS_WITH_SPEAKER.match(text) for text in texts):
        divide = [_BY_PARAGRAPHS if _OF_HH_RLHF.match(text) else _BY_LINES for text in texts]
        return (), [_split(*side) for side in zip(texts, divide, columns, strict=True)]
    shared = _shared_words(*texts)
    if not shared.strip():
        raise _Fault(_missing_column("prompt", list(row)))
    rests = [_text_of(text[len(shared) :].lstrip(), name) for text, name in zip(texts, columns, strict=True)]
    return user_prompt(shared), [(Message("assistant", rest),) for rest in rests]


def _shared_words(chosen: str, rejected: str) -> str:
    """Return what both begin with: up to the name of the assistant, or else in whole words."""
    differ = (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shared = chosen[: next(differ, min(len(chosen), len(rejected)))]
    if named := list(_ANSWERS.finditer(shared)):
        return shared[: named[-1].end()]
    rests = chosen[len(shared) :], rejected[len(shared) :]
    inside_a_word = not all(rest[:1].isspace() or not rest for rest in rests)
    if inside_a_word and shared and not shared[-1].isspace():
        shared = shared.removesuffix(shared.split()[-1])
    return shared.rstrip()


def _divided(before: Turns, sides: Sequence[Turns], columns: Sequence[str]) -> tuple[Turns, Turns, Turns]:
    """Return (prompt, chosen, rejected), divided as the module's first lines say."""
    differ = _Fault("the turns before the responses differ between chosen and rejected.")
    for side, name in zip(sides, columns, strict=True):
        if side[-1].role != "assistant":
            raise _Fault(
                f"column {name!r} ends in a {side[-1].role} turn; a response ends in the assistant's."
            )
    (asked, chosen), (asked_too, rejected) = _behind(before, sides[0]), _behind(before, sides[1])
    if not _alike(asked, asked_too):
        raise differ
    if asked and asked[-1].role == "user":
        for side, name in zip((chosen, rejected), columns, strict=True):
            if side[0].role in ("user", "system"):
                raise _Fault(
                    f"column {name!r} begins with a {side[0].role} turn that the prompt does not have; "
                    "which of the two was asked?"
                )
    # The turns that both begin with, of those that leave each a last one.
    most = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(most) if not _alike(chosen[n : n + 1], rejected[n : n + 1])), most)
    if before and not len(chosen) == len(rejected) == shared + 1:
        shared = 0
    while shared and chosen[shared - 1].role not in ("user", "tool"):
        shared -= 1
    prompt = (*asked, *chosen[:shared])
    if not prompt:
        raise differ
    if prompt[-1].role not in ("user", "tool"):
        raise _Fault(
            f"the prompt ends in a turn of the {prompt[-1].role}; it must end in a user's or a tool's."
        )
    if {chosen[shared].role, rejected[shared].role} & {"user", "system"}:
        raise differ
    return prompt, chosen[shared:], rejected[shared:]


def _behind(before: Turns, side: Turns) -> tuple[Turns, Turns]:
    """Return the prompt and what a side adds to it: a side may hold the whole prompt, or begin with its last turns."""
    count = len(before)
    whole = side[0].role in ("system", "user")
    for start in range(len(side) - count if count and whole else 0):
        if _alike(side[start : start + count], before):
            return side[: start + count], side[start + count :]
    for repeated in range(min(count, len(side) - 1), 0, -1):
        if _alike(side[:repeated], before[-repeated:]):
            return before, side[repeated:]
    return before, side


def _alike(some: Turns, others: Turns) -> bool:
    """Return whether turns say the same, apart from notes, line ends, outer space and composed letters."""

    def said(turn: Message) -> tuple[str, str, dict[str, Any]]:
        text = unicodedata.normalize("NFC", turn.content.strip().replace("\r\n", "\n"))
        return turn.role, text, turn.said_in_fields()

    return some == others or (len(some) == len(others) and [*map(said, some)] == [*map(said, others)])


def _with_system(prompt: Turns, row: Row, column: str) -> Turns:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return prompt
    system = Message("system", _text_of(value, column))
    if prompt[0].role != "system":
        return (system, *prompt)
    if prompt[0] != system:
        raise _Fault(f"column {column!r} says something else than the prompt's system turn.")
    return prompt


def _tools(value: Any, column: str) -> str:
    """Return the tools of a row as JSON text, empty where it has none."""
    if not value:
        return ""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise _Fault(f"column {column!r} is no JSON: {error}.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Fault(f"column {column!r} holds no list of tools.")
    return _text_of(_json_of(tools), column) if tools else ""


def _unless_plain(turns: Turns) -> Turns:
    return () if len(turns) == 1 and not turns[0].fields else turns


# A value → its turns or its text.


def _turns(value: Any, role: str, column: str) -> Turns:
    """Return the turns of messages; a text is one turn of `role`."""
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and turns:
        if all(isinstance(item, str) for item in turns):
            raise _Fault(
                f"column {column!r} holds a list of {len(turns)} texts. Several answers are candidates (as RewardBench 2 "
                "and RM-Bench have them), and a pair has one chosen and one rejected: write a row for each pair."
            )
        if all(isinstance(item, dict) for item in turns):
            return tuple(_turn(item, column) for item in turns)
    return (Message(role, _text_of(value, column)),)


def _turn(turn: dict[str, Any], column: str) -> Message:
    named, said = ("role", "content") if "role" in turn else ("from", "value")
    if not isinstance(turn.get(named), str):
        raise _Fault(f"column {column!r} holds a turn without a role; found {', '.join(turn)}.")
    role = ROLES.get(turn[named].strip().lower())
    if role is None:
        raise _Fault(
            f"column {column!r} holds a turn of the role {turn[named]!r}; known are {', '.join(ROLES)}."
        )
    fields = _fields(turn, (named, said), column) if len(turn) > 2 else ""
    content = _content(turn.get(said), column)
    if fields and content in (None, ""):
        # A tool may have nothing to say, and an assistant may only call one.
        silent = Message(role, "", fields)
        if role == "tool" or silent.said_in_fields():
            return silent
    return Message(role, _text_of(content, column), fields)


def _fields(turn: dict[str, Any], known: tuple[str, str], column: str) -> str:
    more = {name: item for name, item in turn.items() if name not in known}
    if isinstance(more.get("fields"), str):
        # A prepared parquet file holds them as JSON.
        try:
            found = json.loads(more["fields"])
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            del more["fields"]
            more |= found
    more = {name: item for name, item in more.items() if item not in (None, "", [], {})}
    return _text_of(_json_of(more), column) if more else ""


def _content(value: Any, column: str) -> Any:
    """Return the text of a list of parts joined, and any other content as it is."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise _Fault(f"column {column!r} holds a part of the type {kind!r}; only text is read.")
    texts = [part.get("text") for part in value]
    return "".join(_text_of(text, column) for text in texts if text != "")


def _split(text: str, divide: re.Pattern[str], column: str) -> Turns:
    """Return the turns of a transcript."""
    _, *parts = divide.split(text)
    return tuple(
        Message(ROLES[name.lower()], _text_of(said, column).strip())
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _text_of(value: Any, column: str) -> str:
    """Return a value that is a text, and refuse one that is not, is empty, broken or far too long."""
    if not isinstance(value, str):
        raise _Fault(f"column {column!r} holds {type(value).__name__}, not text or chat messages.")
    if not value.strip():
        raise _Fault(f"column {column!r} is empty.")
    if len(value) > MAX_CHARACTERS:
        raise _Fault(
            f"column {column!r} has {len(value):,} characters; at most {MAX_CHARACTERS:,} are taken."
        )
    if not value.isascii() and _SURROGATE.search(value):
        raise _Fault(
            f"column {column!r} holds half of a surrogate pair or bytes that are no UTF-8, which is no text."
        )
    return value


def _json_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
