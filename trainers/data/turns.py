"""Chat turns, in the shapes that rows hold them.

    [{role, content, …}, …]                     messages; also with the names from, value
    {role, content, …}                          one message
    content: [{type: text, text: …}, …]         parts, joined
    "\n\nHuman: …\n\nAssistant: …"              a transcript, as hh-rlhf has them

A turn keeps what it has beside its role and content (tool_calls, reasoning_content, name …) as JSON, in the order that it
has there: a chat template prints it so.
"""

import json
import re
from typing import Any

from trainers.data.records import Message
from trainers.errors import DataError

# Far beyond what any model reads; such a text is a damaged file, or would be tokenised for minutes to be left out.
MAX_CHARACTERS = 500_000

# What the field calls the roles, in any case of letters.
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

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SPEAKER = "Human|User|Assistant|System|Bot|AI"
_BEGINS_WITH_SPEAKER = re.compile(rf"\s*(?:{_SPEAKER}):")
_OF_HH_RLHF = re.compile(r"\s*Human:.*?\n\nAssistant:", re.DOTALL)
_BY_LINES = re.compile(rf"(?:\A\s*|\n)({_SPEAKER}):")
_BY_PARAGRAPHS = re.compile(rf"(?:\A\s*|\n\n)({_SPEAKER}):")


def text_of(value: Any, where: str, column: str) -> str:
    """A text of a row. Raises DataError where it is none, empty, broken or endless."""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text or chat messages."
        )
    if not value.strip():
        raise DataError(f"{where}: column {column!r} is empty.")
    if len(value) > MAX_CHARACTERS:
        raise DataError(
            f"{where}: column {column!r} has {len(value):,} characters; at most {MAX_CHARACTERS:,} are taken."
        )
    if not value.isascii() and _SURROGATE.search(value):
        raise DataError(
            f"{where}: column {column!r} holds half of a surrogate pair or bytes that are no UTF-8, which is no text."
        )
    return value


def turns_of(value: Any, where: str, column: str) -> tuple[Message, ...] | None:
    """The turns of messages; None where a value is none, so that it may be text. Raises DataError."""
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        return None
    if all(isinstance(item, str) for item in turns):
        raise DataError(
            f"{where}: column {column!r} holds a list of {len(turns)} texts. Several answers are candidates (as "
            "RewardBench 2 and RM-Bench have them), and a pair has one chosen and one rejected: write a row for each pair."
        )
    if not all(isinstance(item, dict) for item in turns):
        return None
    return tuple(_turn(item, where, column) for item in turns)


def transcript_of(text: str, where: str, column: str) -> tuple[Message, ...] | None:
    """The turns of a text that begins with a speaker's name and a colon; None of another text. Raises DataError."""
    if not _BEGINS_WITH_SPEAKER.match(text):
        return None
    divide = _BY_PARAGRAPHS if _OF_HH_RLHF.match(text) else _BY_LINES
    _, *parts = divide.split(text)
    return tuple(
        Message(ROLES[name.lower()], text_of(said, where, column).strip())
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    )


def json_of(value: Any) -> str:
    """A value as JSON text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _turn(turn: dict[str, Any], where: str, column: str) -> Message:
    named, said = ("role", "content") if "role" in turn else ("from", "value")
    if not isinstance(turn.get(named), str):
        raise DataError(f"{where}: column {column!r} holds a turn without a role; found {', '.join(turn)}.")
    role = ROLES.get(turn[named].strip().lower())
    if role is None:
        raise DataError(
            f"{where}: column {column!r} holds a turn of the role {turn[named]!r}; known are {', '.join(ROLES)}."
        )
    more = {name: item for name, item in turn.items() if name not in (named, said, "fields")}
    more |= _parsed(turn.get("fields"))
    more = {name: item for name, item in more.items() if item not in (None, "", [], {})}
    fields = text_of(json_of(more), where, column) if more else ""
    content = _content(turn.get(said), where, column)
    if fields and content in (None, ""):
        return Message(role, "", fields)
    return Message(role, text_of(content, where, column), fields)


def _parsed(fields: Any) -> dict[str, Any]:
    """The fields that a prepared parquet file holds as JSON."""
    try:
        found = json.loads(fields)
    except (TypeError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"fields": fields}


def _content(value: Any, where: str, column: str) -> Any:
    """Parts joined; any other content as it is."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(
                f"{where}: column {column!r} holds a part of the type {kind!r}; only text is read."
            )
    return "".join(text_of(part.get("text"), where, column) for part in value)
