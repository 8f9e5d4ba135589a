"""A row → a preference pair, in the formats that TRL documents.

    prompt, chosen, rejected     each as text, or as chat messages ({role, content})
    chosen, rejected             conversations: their last turn is the response, the turns before it the prompt
    chosen, rejected             texts: what both begin with is the prompt

What is wrong is a DataError that names the row and the column.
"""

import re
from typing import Any

from trainers.data.formats import Row, missing_column
from trainers.data.records import Message, Pair, user_prompt
from trainers.errors import DataError
from trainers.specs import DatasetSpec

# Far beyond what any model reads; such a text is a damaged file, or would be tokenised for minutes to be left out.
MAX_CHARACTERS = 500_000

_SURROGATE = re.compile(r"[\ud800-\udfff]")


def pair_of(row: Row, where: str, spec: DatasetSpec) -> Pair:
    """The pair that a row holds. Raises DataError."""
    chosen_column, rejected_column = spec.column("chosen"), spec.column("rejected")
    for name in (chosen_column, rejected_column):
        if name not in row:
            raise missing_column(name, list(row), where)
    before_chosen, chosen = _response(row[chosen_column], where, chosen_column)
    before_rejected, rejected = _response(row[rejected_column], where, rejected_column)
    if before_chosen != before_rejected:
        raise DataError(f"{where}: the turns before the responses differ between chosen and rejected.")
    prompt_column, original = spec.column("prompt"), row.get(spec.column("orig_chosen"))
    if before_chosen:
        prompt = before_chosen
    elif prompt_column in row:
        prompt = _prompt(row[prompt_column], where, prompt_column)
    else:
        shared = _shared_prefix(chosen, rejected)
        if not shared.strip():
            raise missing_column(prompt_column, list(row), where)
        prompt = user_prompt(shared)
        chosen = text_of(chosen[len(shared) :], where, chosen_column)
        rejected = text_of(rejected[len(shared) :], where, rejected_column)
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        original_chosen=text_of(original, where, "orig_chosen")
        if isinstance(original, str) and original
        else None,
    )


def _shared_prefix(chosen: str, rejected: str) -> str:
    """What both begin with; a space before the first difference belongs to the responses, as in TRL."""
    differ = (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    return chosen[: next(differ, min(len(chosen), len(rejected)))].removesuffix(" ")


def _prompt(value: Any, where: str, column: str) -> tuple[Message, ...]:
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return _messages(value, where, column)
    return user_prompt(text_of(value, where, column))


def _response(value: Any, where: str, column: str) -> tuple[tuple[Message, ...], str]:
    """The turns before a response (none for plain text) and the response."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        *before, last = _messages(value, where, column)
        return tuple(before), last.content
    if isinstance(value, list) and value and all(isinstance(step, str) for step in value):
        return (), text_of(" ".join(value), where, column)
    return (), text_of(value, where, column)


def _messages(value: list[dict[str, Any]], where: str, column: str) -> tuple[Message, ...]:
    return tuple(
        Message(text_of(turn.get("role"), where, column), text_of(turn.get("content"), where, column))
        for turn in value
    )


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
