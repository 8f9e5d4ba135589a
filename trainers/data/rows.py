"""A row → a preference pair, in the formats that TRL documents.

    prompt, chosen, rejected     each as text, or as chat messages ({role, content, …})
    chosen, rejected             conversations: the turns that both begin with are the prompt
    chosen, rejected             texts: transcripts are conversations; of others the whole words that both begin with
    system, tools                of the prompt, where there are any

Where the prompt ends: the turns of chosen and rejected stand behind those of the prompt column, of which they may
repeat the last. Where the two differ in their last turn only, that is what is scored, and the turns before it are of
the prompt; else all turns behind the prompt column are, or behind what both begin with where there is no such column.
A prompt ends in a user's or a tool's turn, a response in the assistant's.

What is wrong is a DataError that names the row and the column.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from trainers.data.formats import Row, missing_column
from trainers.data.records import Message, Pair, user_prompt
from trainers.data.turns import json_of, text_of, transcript_of, turns_of
from trainers.errors import DataError
from trainers.specs import DatasetSpec

Turns = tuple[Message, ...]

# What a prompt is called where no column map says it.
_PROMPTS = ("prompt", "question")
# Other columns that may hold the prompt of texts: then these are no texts without one.
_LIKE_PROMPTS = ("instruction", "query", "problem", "conversation", "conversations", "messages", "dialogue")
# Columns that say more of what was asked than is read. Of others nothing is lost: they are notes on a row.
_NOT_READ = ("system_prompt", "history", "context", "input", "documents", "chat_template_kwargs")
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_ANSWERS = re.compile(r"(?:\A|\n)(?:Assistant|Bot|AI):")


def prompt_column(row: Row, spec: DatasetSpec) -> str | None:
    """The column with the prompts of a split whose first row this is; None where both sides begin with them."""
    mapped = dict(spec.columns).get("prompt")
    return mapped or next((name for name in _PROMPTS if name in row), None)


def pair_of(row: Row, where: str, spec: DatasetSpec, asked: str | None) -> Pair:
    """The pair that a row holds; `asked` is the `prompt_column` of its split. Raises DataError."""
    columns = spec.column("chosen"), spec.column("rejected")
    mapped = [column for _, column in spec.columns]
    for name in (*columns, *([] if asked is None else [asked]), *mapped):
        if name not in row:
            raise missing_column(name, list(row), where)
    if prompt_column(row, spec) != asked:
        raise DataError(
            f"{where}: has a column {prompt_column(row, spec)!r}, which the split's first row lacks."
        )
    _require_read(row, where, mapped)
    before: Turns = ()
    if asked is not None:
        before = _turns(row[asked], "user", where, asked)
        sides = [_turns(row[name], "assistant", where, name) for name in columns]
    elif all(isinstance(row[name], str) for name in columns):
        before, sides = _shared_texts(row, where, columns)
    else:
        sides = [_turns(row[name], "assistant", where, name) for name in columns]
    prompt, chosen, rejected = _divided(before, sides, where, columns)
    original = row.get(spec.column("orig_chosen"))
    return Pair(
        prompt=_with_system(prompt, row.get(spec.column("system")), where, spec.column("system")),
        chosen=_text(chosen),
        rejected=_text(rejected),
        chosen_turns=_unless_plain(chosen),
        rejected_turns=_unless_plain(rejected),
        tools=_tools(row.get(spec.column("tools")), where, spec.column("tools")),
        original_chosen=text_of(original, where, "orig_chosen")
        if isinstance(original, str) and original
        else None,
    )


def _require_read(row: Row, where: str, mapped: Sequence[str]) -> None:
    for name in (*_NOT_READ, *_NOT_TEXT):
        if row.get(name) and name not in mapped:
            how = (
                "only text is read"
                if name in _NOT_TEXT
                else f"map it (--columns prompt={name} or system={name}), put it into the prompt"
            )
            raise DataError(f"{where}: column {name!r} is part of what was asked; {how}, or drop it.")


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
    (asked, chosen), (asked_too, rejected) = (_behind(before, side) for side in sides)
    differ = DataError(f"{where}: the turns before the responses differ between chosen and rejected.")
    if asked != asked_too:
        raise differ
    shared = _agreeing(chosen, rejected)
    if before and not len(chosen) == len(rejected) == shared + 1:
        shared = 0
    while shared and chosen[shared - 1].role not in ("user", "tool"):
        shared -= 1
    prompt = (*asked, *chosen[:shared])
    if not prompt:
        raise differ
    if prompt[-1].role not in ("user", "tool"):
        raise DataError(
            f"{where}: the prompt ends in a turn of the {prompt[-1].role}; it must end in a user's or a tool's."
        )
    for side, name in zip((chosen[shared:], rejected[shared:]), columns, strict=True):
        if side[0].role in ("user", "system"):
            another = DataError(
                f"{where}: column {name!r} begins with a {side[0].role} turn that the prompt does not have; "
                "which of the two was asked?"
            )
            raise another if before else differ
    return prompt, chosen[shared:], rejected[shared:]


def _behind(before: Turns, side: Turns) -> tuple[Turns, Turns]:
    """The prompt and what a side adds to it: a side may hold the whole prompt, or begin with the last turns of it."""
    said, asked = [_key(turn) for turn in side], [_key(turn) for turn in before]
    count = len(asked)
    whole = side[0].role in ("system", "user")
    for start in range(len(said) - count if count and whole else 0):
        if said[start : start + count] == asked:
            return side[: start + count], side[start + count :]
    for repeated in range(min(count, len(said) - 1), 0, -1):
        if said[:repeated] == asked[-repeated:]:
            return before, side[repeated:]
    return before, side


def _key(turn: Message) -> tuple[str, str, str]:
    return turn.role, turn.content.strip(), turn.fields


def _agreeing(chosen: Turns, rejected: Turns) -> int:
    """How many turns both begin with, of those that leave each a last one."""
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if chosen[n] != rejected[n]), most)


def _with_system(prompt: Turns, value: Any, where: str, column: str) -> Turns:
    if value is None or value == "":
        return prompt
    system = Message("system", text_of(value, where, column))
    if prompt[0].role != "system":
        return (system, *prompt)
    if prompt[0] != system:
        raise DataError(f"{where}: column {column!r} says something else than the prompt's system turn.")
    return prompt


def _tools(value: Any, where: str, column: str) -> str:
    """The tools of a row as JSON text, empty where it has none."""
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
