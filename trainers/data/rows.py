"""A row → a preference pair, in the formats that TRL documents.

    prompt, chosen, rejected     each as text, or as chat messages ({role, content, …})
                                 a prompt in text may be what hh-rlhf's transcripts begin with, up to `Assistant:`
    chosen, rejected             conversations: the turns that both begin with are the prompt
    chosen, rejected             texts: transcripts are conversations; of others the whole words that both begin with
    system, tools                of the prompt, where there are any

Where the prompt ends: the turns of chosen and rejected stand behind those of the prompt column, of which they may
repeat the last. Where the two differ in their last turn only, that is what is scored, and the turns before it are of
the prompt; else all turns behind the prompt column are, or behind what both begin with where there is no such column.
A prompt ends in a user's or a tool's turn, a response in the assistant's.

What is wrong is a DataError that names the row and the column.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from trainers.data.formats import Row, missing_column
from trainers.data.records import Message, Pair, user_prompt
from trainers.data.turns import asked_of, json_of, text_of, transcript_of, turns_of
from trainers.errors import DataError
from trainers.specs import COLUMNS, DatasetSpec

Turns = tuple[Message, ...]

# What a prompt is called where no column map says it.
_PROMPTS = ("prompt", "question")
# Other columns that may hold the prompt of texts: then these are no texts without one.
_LIKE_PROMPTS = ("instruction", "query", "problem", "conversation", "conversations", "messages", "dialogue")
# Columns that say more of what was asked than is read. Of others nothing is lost: they are notes on a row.
_NOT_READ = ("system_prompt", "history", "context", "input", "documents", "chat_template_kwargs")
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_UNREAD = frozenset((*_NOT_READ, *_NOT_TEXT))
_ANSWERS = re.compile(r"(?:\A|\n)(?:Assistant|Bot|AI):")


def prompt_column(row: Row, spec: DatasetSpec) -> str | None:
    """The column with the prompts of a split whose first row this is; None where both sides begin with them."""
    mapped = dict(spec.columns).get("prompt")
    return mapped or next((name for name in _PROMPTS if name in row), None)


def pair_of(row: Row, where: str, spec: DatasetSpec, asked: str | None) -> Pair:
    """The pair that a row holds; `asked` is the `prompt_column` of its split. Raises DataError."""
    called, mapped = _called(spec.columns)
    columns = called["chosen"], called["rejected"]
    for name in (*columns, asked, *mapped):
        if name not in row and name is not None:
            raise missing_column(name, list(row), where)
    if asked != "prompt" and (found := prompt_column(row, spec)) != asked:
        raise DataError(f"{where}: has a column {found!r}, which the split's first row lacks.")
    _require_read(row, where, mapped)
    before: Turns = ()
    if asked is not None:
        before, sides = _asked(row, where, columns, asked)
    elif all(isinstance(row[name], str) for name in columns):
        before, sides = _shared_texts(row, where, columns)
    else:
        sides = [_turns(row[name], "assistant", where, name) for name in columns]
        if all(turn.role in ("assistant", "tool") for side in sides for turn in side):
            raise missing_column("prompt", list(row), where)
    prompt, chosen, rejected = _divided(before, sides, where, columns)
    original = row.get(called["orig_chosen"])
    return Pair(
        prompt=_with_system(prompt, row, where, called["system"]),
        chosen=_text(chosen),
        rejected=_text(rejected),
        chosen_turns=_unless_plain(chosen),
        rejected_turns=_unless_plain(rejected),
        tools=_tools(row, where, called["tools"]),
        original_chosen=text_of(original, where, "orig_chosen")
        if isinstance(original, str) and original
        else None,
    )


@functools.cache
def _called(columns: tuple[tuple[str, str], ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(the column of each meaning, those that a map names)."""
    return {meaning: meaning for meaning in COLUMNS} | dict(columns), tuple(column for _, column in columns)


def _require_read(row: Row, where: str, mapped: Sequence[str]) -> None:
    if _UNREAD.isdisjoint(row):
        return
    for name in (*_NOT_READ, *_NOT_TEXT):
        if row.get(name) and name not in mapped:
            how = (
                "only text is read; drop it"
                if name in _NOT_TEXT
                else f"map it (--columns prompt={name} or system={name}), put it into the prompt, or drop it"
            )
            raise DataError(f"{where}: column {name!r} is part of what was asked; {how}.")


def _asked(row: Row, where: str, columns: Sequence[str], asked: str) -> tuple[Turns, list[Turns]]:
    """The turns of a prompt column and of both sides, which may hold the prompt too where it is a transcript."""
    text = row[asked]
    before = asked_of(text, where, asked) if isinstance(text, str) else None
    said = [row[name] for name in columns]
    if before is not None:
        said = [side.removeprefix(text.rstrip()).strip() if isinstance(side, str) else side for side in said]
    sides = [_turns(side, "assistant", where, name) for side, name in zip(said, columns, strict=True)]
    return before or _turns(text, "user", where, asked), sides


def _turns(value: Any, role: str, where: str, column: str) -> Turns:
    """The turns of a value; a text is one of `role`."""
    return turns_of(value, where, column) or (Message(role, text_of(value, where, column)),)


def _shared_texts(row: Row, where: str, columns: Sequence[str]) -> tuple[Turns, list[Turns]]:
    """The prompt that two texts begin with and what follows it, or the turns of two transcripts."""
    chosen, rejected = (text_of(row[name], where, name) for name in columns)
    for name in _LIKE_PROMPTS:
        if row.get(name):
            raise missing_column("prompt", list(row), where)
    talks = [transcript_of(text, where, name) for text, name in zip((chosen, rejected), columns, strict=True)]
    if talks[0] and talks[1]:
        return (), [talks[0], talks[1]]
    shared = _shared_words(chosen, rejected)
    if not shared.strip():
        raise missing_column("prompt", list(row), where)
    rests = [
        text_of(text[len(shared) :].lstrip(), where, name)
        for text, name in zip((chosen, rejected), columns, strict=True)
    ]
    return user_prompt(shared), [(Message("assistant", rest),) for rest in rests]


def _shared_words(chosen: str, rejected: str) -> str:
    """What both begin with, up to where the assistant is named, or else in whole words; the space after it is nobody's."""
    differ = (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shared = chosen[: next(differ, min(len(chosen), len(rejected)))]
    if named := list(_ANSWERS.finditer(shared)):
        return shared[: named[-1].end()]
    rests = chosen[len(shared) :], rejected[len(shared) :]
    inside_a_word = not all(rest[:1].isspace() or not rest for rest in rests)
    if inside_a_word and shared and not shared[-1].isspace():
        shared = shared.removesuffix(shared.split()[-1])
    return shared.rstrip()


def _divided(
    before: Turns, sides: Sequence[Turns], where: str, columns: Sequence[str]
) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected): see the module's first lines."""
    for side, name in zip(sides, columns, strict=True):
        if side[-1].role != "assistant":
            raise DataError(
                f"{where}: column {name!r} ends in a {side[-1].role} turn; a response ends in the assistant's."
            )
    (asked, chosen), (asked_too, rejected) = _behind(before, sides[0]), _behind(before, sides[1])
    if not _alike(asked, asked_too):
        raise _differ(where)
    if asked and asked[-1].role == "user":
        for side, name in zip((chosen, rejected), columns, strict=True):
            if side[0].role in ("user", "system"):
                raise DataError(
                    f"{where}: column {name!r} begins with a {side[0].role} turn that the prompt does not have; "
                    "which of the two was asked?"
                )
    shared = _agreeing(chosen, rejected)
    if before and not len(chosen) == len(rejected) == shared + 1:
        shared = 0
    while shared and chosen[shared - 1].role not in ("user", "tool"):
        shared -= 1
    prompt = (*asked, *chosen[:shared])
    if not prompt:
        raise _differ(where)
    if prompt[-1].role not in ("user", "tool"):
        raise DataError(
            f"{where}: the prompt ends in a turn of the {prompt[-1].role}; it must end in a user's or a tool's."
        )
    if {chosen[shared].role, rejected[shared].role} & {"user", "system"}:
        raise _differ(where)
    return prompt, chosen[shared:], rejected[shared:]


def _differ(where: str) -> DataError:
    return DataError(f"{where}: the turns before the responses differ between chosen and rejected.")


def _behind(before: Turns, side: Turns) -> tuple[Turns, Turns]:
    """The prompt and what a side adds to it: a side may hold the whole prompt, or begin with the last turns of it."""
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
    """Whether turns say the same: notes on them, ends of lines, space around them and composed letters do not count."""
    return some == others or (
        len(some) == len(others)
        and all(
            one.role == other.role
            and _plain(one.content) == _plain(other.content)
            and one.said_in_fields() == other.said_in_fields()
            for one, other in zip(some, others, strict=True)
        )
    )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip().replace("\r\n", "\n"))


def _agreeing(chosen: Turns, rejected: Turns) -> int:
    """How many turns both begin with, of those that leave each a last one."""
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if not _alike(chosen[n : n + 1], rejected[n : n + 1])), most)


def _with_system(prompt: Turns, row: Row, where: str, column: str) -> Turns:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return prompt
    system = Message("system", text_of(value, where, column))
    if prompt[0].role != "system":
        return (system, *prompt)
    if prompt[0] != system:
        raise DataError(f"{where}: column {column!r} says something else than the prompt's system turn.")
    return prompt


def _tools(row: Row, where: str, column: str) -> str:
    """The tools of a row as JSON text, empty where it has none."""
    value = row.get(column)
    if not value:
        return ""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: column {column!r} is no JSON: {error}.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: column {column!r} holds no list of tools.")
    return text_of(json_of(tools), where, column) if tools else ""


def _text(turns: Turns) -> str:
    """What turns say; a turn that only calls tools says that."""
    return "\n\n".join(turn.content or turn.fields for turn in turns)


def _unless_plain(turns: Turns) -> Turns:
    return () if len(turns) == 1 and not turns[0].fields else turns
