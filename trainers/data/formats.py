"""Rows → preference pairs. FORMATS is the table of formats: the columns that a row must have, and how it is read.

A format's reader turns a row into rows of prompt, chosen and rejected, one for each pair. Those, and rows
that have these columns themselves, are in one of the formats that TRL documents (docs/data.md).

Where the prompt ends: the turns of chosen and rejected follow those of the prompt column, the last of which
they may repeat. Where the two sides differ in their last turn only, that turn is scored and the turns before
it belong to the prompt. Otherwise all turns after the prompt column are scored; without a prompt column, all
turns after those that both sides begin with. A prompt ends in a user's or a tool's turn, a response in the
assistant's.

What a turn has beside its role and content (tool_calls, reasoning_content, name, …) is kept as JSON in its
own order, because a chat template prints it in that order.
"""

import functools
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from trainers.data.files import Fault, Located, Row
from trainers.data.records import PLACE, TIE, Candidates, Message, Pair, user_prompt
from trainers.errors import DataError
from trainers.evaluate.suites import SUITES
from trainers.specs import DatasetSpec

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
Turns = tuple[Message, ...]

_SIDES = ("chosen", "rejected")
# About one chosen and one rejected response.
_OF_ONE_PAIR = ("margin", "score_chosen", "score_rejected", "rewritten_chosen", "rewritten_rejected")
# Columns that are read in every format, if they are there.
_BESIDE = ("system", "tools", "orig_chosen", PLACE, TIE, *_OF_ONE_PAIR)
# Names that a prompt has beside chosen and rejected, as text or as turns.
_LIKE_PROMPTS = (
    *("instruction", "input", "query", "problem"),
    *("conversations", "conversation", "messages", "dialogue", "trajectory"),
)
# Columns that hold a part of what was asked and are not read. Columns of any other name are notes on a row.
_NOT_READ = (
    *("system_prompt", "history", "context", "input", "documents", "chat_template_kwargs"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ANSWERS = re.compile(r"(?:\A|\n)(?:Assistant|Bot|AI):")
_SPEAKER = "Human|User|Assistant|System|Bot|AI"
_BEGINS_WITH_SPEAKER = re.compile(rf"\s*(?:{_SPEAKER}):")
_OF_HH_RLHF = re.compile(r"\s*Human:.*?\n\nAssistant:", re.DOTALL)
_BY_LINES = re.compile(rf"(?:\A\s*|\n)({_SPEAKER}):")
_BY_PARAGRAPHS = re.compile(rf"(?:\A\s*|\n\n)({_SPEAKER}):")


# The table of formats.


class Format(NamedTuple):
    """A format: the columns of its rows, the first never empty, and how to read one.

    `rows` turns a row into one row for each pair, with ties marked.
    """

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Row], Iterable[Row]]


def _ranked(prompt: Any, rated: Iterable[tuple[Any, Any]]) -> Iterator[Row]:
    """Yield a row for every two answers, the better rated one chosen. Without a `prompt`, the answers contain it.

    The margin is the difference of the ratings, unless these are True (it won) and False.
    """
    asked = {} if prompt is None else {"prompt": prompt}
    answers = [(answer, rating, float(rating)) for answer, rating in rated]
    for one, other in itertools.permutations(range(len(answers)), 2):
        (chosen, rating, high), (rejected, _, low) = answers[one], answers[other]
        if math.isnan(high - low):
            raise Fault("a rating is no number.")
        if high > low or (high == low and one < other):
            measured = {} if isinstance(rating, bool) or high == low else {"margin": high - low}
            yield {
                **asked,
                "chosen": chosen,
                "rejected": rejected,
                "rating": high,
                TIE: high == low,
                **measured,
            }


def _of_two(name: str, columns: tuple[str, ...], ratings: Callable[[Any], tuple[float, float]]) -> Format:
    """Return the format with columns for [the prompt,] two answers, and a value that `ratings` turns into their ratings."""
    *asked, first, second, by = columns

    def rows(row: Row) -> Iterable[Row]:
        rated = zip((row[first], row[second]), ratings(row[by]), strict=True)
        return _ranked(row[asked[0]] if asked else None, rated)

    return Format(name, columns, rows)


def _strength(value: Any) -> tuple[float, float]:
    if isinstance(value, bool):
        raise Fault(f"the preference {value} does not say which of the two is preferred.")
    return 0.0, float(value)


def _number(value: Any) -> tuple[bool, bool]:
    # A soft label says neither: it is no row of this format.
    return {0.0: (True, False), 1.0: (False, True)}[float(value)]


def _winner(value: Any) -> tuple[bool, bool]:
    name = str(value).lower().removeprefix("model_").removeprefix("response_")
    if "tie" in name or "both" in name:
        return False, False
    if name not in ("a", "b"):
        raise Fault(f"the winner {value!r} is none of model_a, model_b, tie.")
    return _number(name == "b")


def _preferred(value: Any) -> tuple[float, float]:
    """A number below 0 prefers the first answer, above 0 the second; or the name of the one that won."""
    try:
        return _strength(value)
    except ValueError:
        return _winner(value)


def _openai(row: Row) -> Iterable[Row]:
    asked = row["input"]
    sides = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return [{"prompt": asked["messages"], "tools": asked.get("tools"), **sides}]


def _summaries(row: Row) -> Iterable[Row]:
    """The prompt is worded as in TRL's script for the set."""
    info = row["info"]
    title = f"TITLE: {info['title']}\n\n"
    post = (
        f"SUBREDDIT: r/{info['subreddit']}\n\n{title}POST: {info['post']}"
        if info.get("post")
        else title + info["article"]
    )
    texts = [summary["text"] for summary in row["summaries"]]
    return _ranked(f"{post}\n\nTL;DR:", zip(texts, _number(row["choice"]), strict=True))


def _swift(row: Row) -> Iterable[Row]:
    last = {"role": "assistant", "content": row["rejected_response"]}
    return [{"chosen": row["messages"], "rejected": [*row["messages"][:-1], last]}]


def _are_candidates(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _candidates(row: Row) -> Iterable[Row]:
    """Each chosen answer against each rejected one."""
    asked = row["prompt"] if "prompt" in row else row["question"]
    answers = (row[side] if _are_candidates(row[side]) else [row[side]] for side in _SIDES)
    return [
        {"prompt": asked, "chosen": chosen, "rejected": rejected}
        for chosen, rejected in itertools.product(*answers)
    ]


def _alpaca(row: Row) -> Iterable[Row]:
    asked = "\n".join(filter(None, (row["instruction"], row["input"])))
    return [{"prompt": asked, "chosen": row["chosen"], "rejected": row["rejected"]}]


@functools.cache
def _called(name: str, *columns: str) -> Format:
    """Return the format of prompt (where there is one), chosen and rejected in these columns."""
    meanings = ("prompt", *_SIDES)[-len(columns) :]
    return Format(name, columns, lambda row: [dict(zip(meanings, map(row.get, columns), strict=True))])


FORMATS = (
    _of_two("HelpSteer3", ("context", "response1", "response2", "overall_preference"), _strength),
    _of_two("HelpSteer2", ("prompt", "response_1", "response_2", "preference_strength"), _strength),
    _of_two("Chatbot Arena", ("conversation_a", "conversation_b", "winner"), _winner),
    _of_two("a, b and a preference", ("prompt", "a", "b", "preference"), _preferred),
    _of_two("two responses and a winner", ("prompt", "response_a", "response_b", "winner"), _winner),
    _of_two(
        "PKU-SafeRLHF, by helpfulness", ("prompt", "response_0", "response_1", "better_response_id"), _number
    ),
    _of_two("SHP", ("history", "human_ref_B", "human_ref_A", "labels"), _number),
    Format(
        "UltraFeedback",
        ("instruction", "completions"),
        lambda row: _ranked(
            row["instruction"], ((said["response"], said["overall_score"]) for said in row["completions"])
        ),
    ),
    Format(
        "Nectar",
        ("prompt", "answers"),
        lambda row: _ranked(
            row["prompt"], ((said["answer"], -float(said["rank"])) for said in row["answers"])
        ),
    ),
    Format("summarize-from-feedback", ("info", "summaries", "choice"), _summaries),
    Format("OpenAI's preferences", ("input", "preferred_output", "non_preferred_output"), _openai),
    Format("ms-swift", ("messages", "rejected_response"), _swift),
    _called("ms-swift, rejected messages", "messages", "rejected_messages"),
    Format(
        "rated generations",
        ("instruction", "generations", "ratings"),
        lambda row: _ranked(row["instruction"], zip(row["generations"], row["ratings"], strict=True)),
    ),
    _called("Argilla", "instruction", "chosen_response", "rejected_response"),
    Format("instruction, input, chosen and rejected", ("instruction", "input", *_SIDES), _alpaca),
    *(_called(f"{name}, chosen and rejected", name, *_SIDES) for name in _LIKE_PROMPTS),
)
_CONVERSATIONS = _called("chosen and rejected, which both begin with the prompt", *_SIDES)
_PLAIN = _called("prompt, chosen and rejected", "prompt", *_SIDES)


# A row → its format → its pairs.


def pairs_of(located: Located, spec: DatasetSpec, read_as: Format) -> list[Pair]:
    """Return the pairs of a row in its split's format `read_as`; ties only if the set keeps them. Raises DataError."""
    try:
        return _pairs_of(located.sound(), spec, read_as)
    except Fault as fault:
        name = f", read as {read_as.name}" if read_as in FORMATS else ""
        raise DataError(f"{located.where}{name}: {fault}") from fault


def text_of(value: Any, column: str) -> str:
    """Return a value that is a text. Raises Fault on one that is not, is empty, broken or far too long."""
    if not isinstance(value, str):
        raise Fault(f"column {column!r} holds {type(value).__name__}, not text or chat messages.")
    if not value.strip():
        raise Fault(f"column {column!r} is empty.")
    if len(value) > MAX_CHARACTERS:
        raise Fault(f"column {column!r} has {len(value):,} characters; at most {MAX_CHARACTERS:,} are taken.")
    if not value.isascii() and _SURROGATE.search(value):
        raise Fault(
            f"column {column!r} holds half of a surrogate pair or bytes that are no UTF-8, which is no text."
        )
    return value


def _named(row: Row, spec: DatasetSpec) -> Row:
    """Return the row with its mapped columns under the names that the map gives them too."""
    mapped = {meaning: row[name] for meaning, name in spec.columns if name in row}
    return {**row, **mapped} if mapped else row


def format_of(row: Row, spec: DatasetSpec) -> Format:
    """Return the format of a row, which is that of its split if it is the first."""
    row = _named(row, spec)
    asked = next((name for name in ("prompt", "question") if name in row), None)
    has_sides = "chosen" in row and "rejected" in row
    if not (has_sides and (asked or all(_begins_in_prompt(row[side]) for side in _SIDES))):
        for known in FORMATS:
            if row.keys() >= {*known.columns} and row[known.columns[0]] not in (None, "", []):
                return known
    if asked and any(_are_candidates(row.get(side)) for side in _SIDES):
        return Format("candidates", (asked, *_SIDES), _candidates)
    return _called(f"{asked}, chosen and rejected", asked, *_SIDES) if asked else _CONVERSATIONS


def _begins_in_prompt(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(role, str) and ROLES.get(role.strip().lower()) in ("system", "user")


def _missing(name: str, found: Iterable[str], read_as: Format = _PLAIN) -> str:
    return (
        f"no column {name!r}; needed are {', '.join(read_as.columns)}; found {', '.join(found)}. "
        "Say which is which with a column map (prompt=…, chosen=…, rejected=…)."
    )


def _pairs_of(row: Row, spec: DatasetSpec, read_as: Format) -> list[Pair]:
    called, named = dict(spec.columns), _named(row, spec)
    for name in (*called.values(), *(column for column in read_as.columns if column not in called)):
        if name not in row:
            raise Fault(_missing(name, row, read_as if read_as in FORMATS else _PLAIN))
    if (found := format_of(row, spec)) != read_as:
        raise Fault(
            f"is {found.name}, and the split's first row is {read_as.name}; give each format a file of its own."
        )
    for name in _NOT_READ:
        if row.get(name) and name not in (*called.values(), *read_as.columns):
            raise Fault(
                f"column {name!r} is part of what was asked; if it is text, map it (--columns prompt={name} or "
                f"system={name}) or put it into the prompt; else drop it."
            )
    beside: Row = {name: named[name] for name in _BESIDE if name in named}
    try:
        made = list(read_as.rows(named))
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        at = ", ".join(read_as.columns)
        raise Fault(
            f"the values of {at} are not as they should be ({error!r}); mend the row or drop it."
        ) from error
    ratings = [item["rating"] for item in made if "rating" in item]
    if ratings or len(made) > 1:
        # A column about one pair does not say which of several answers it is about.
        if given := [name for name in _OF_ONE_PAIR if name in called]:
            raise Fault(
                f"{given[0]}={called[given[0]]} does not say which of the answers it is about; leave it out."
            )
        beside = {name: value for name, value in beside.items() if name not in _OF_ONE_PAIR}
    if ratings and spec.ratings == "best":
        made = [item for item in made if item["rating"] == max(ratings)]
    made = [{**beside, **item} for item in made]
    called = {"prompt": read_as.columns[0], **called}
    return [_pair_of(item, called, row) for item in made if spec.ties or item.get(TIE) is not True]


def _pair_of(row: Row, called: dict[str, str], found: Iterable[str]) -> Pair:
    """Return the pair of a row of prompt, chosen and rejected; `called` maps meanings to the user's column names; `found` are the names of all columns, for messages."""
    columns = called.get("chosen", "chosen"), called.get("rejected", "rejected")
    said = [row[side] for side in _SIDES]
    before: Turns = ()
    if "prompt" in row:
        before, sides = _after_prompt(row["prompt"], said, (called.get("prompt", "prompt"), *columns))
    elif all(isinstance(side, str) for side in said):
        before, sides = _shared_texts(said, columns)
    else:
        sides = [_turns(side, "assistant", name) for side, name in zip(said, columns, strict=True)]
        if all(turn.role in ("assistant", "tool") for side in sides for turn in side):
            raise Fault(_missing("prompt", found))
    prompt, chosen, rejected = _divided(before, sides, columns)
    original = row.get("orig_chosen")
    return Pair(
        prompt=_with_system(prompt, row.get("system"), called.get("system", "system")),
        chosen="\n\n".join(turn.content or turn.fields for turn in chosen),
        rejected="\n\n".join(turn.content or turn.fields for turn in rejected),
        chosen_turns=_unless_plain(chosen),
        rejected_turns=_unless_plain(rejected),
        tools=_tools(row.get("tools"), called.get("tools", "tools")),
        margin=_margin(row),
        candidates=_place(row.get(PLACE)),
        original_chosen=text_of(original, "orig_chosen") if isinstance(original, str) and original else None,
        rewritten=_rewritten(row),
        tie=row.get(TIE) is True,
    )


def _place(value: Any) -> Candidates | None:
    """Return the place in a suite that `as_row` wrote."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {*Candidates._fields} or value["suite"] not in SUITES:
        raise Fault(f"column {PLACE!r} is no place in a suite as `prepare` writes it; drop it.")
    return Candidates(**value)


def _rewritten(row: Row) -> tuple[str, str] | None:
    """Return the two responses in other words; None where either is missing."""
    chosen, rejected = row.get("rewritten_chosen"), row.get("rewritten_rejected")
    if chosen in (None, "") or rejected in (None, ""):
        return None
    return text_of(chosen, "rewritten_chosen"), text_of(rejected, "rewritten_rejected")


def _margin(row: Row) -> float | None:
    """Return the number in the column margin, else the difference of the two scores; None where there is none."""
    given = row.get("margin") not in (None, "")
    try:
        margin = float(row["margin"]) if given else float(row["score_chosen"]) - float(row["score_rejected"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return margin if math.isfinite(margin) else None


def _after_prompt(text: Any, said: list[Any], columns: Sequence[str]) -> tuple[Turns, list[Turns]]:
    """Return the turns of the prompt and of both sides, without the prompt where a transcript repeats it."""
    asked = columns[0]
    before: Turns | None = None
    if isinstance(text, str) and _OF_HH_RLHF.match(text):
        start = text.rstrip().removesuffix("\n\nAssistant:")
        if start != text.rstrip():
            before = _split(start, _BY_PARAGRAPHS, asked)
            said = [s.removeprefix(text.rstrip()).strip() if isinstance(s, str) else s for s in said]
    sides = [_turns(side, "assistant", name) for side, name in zip(said, columns[1:], strict=True)]
    return before or _turns(text, "user", asked), sides


def _shared_texts(said: list[str], columns: Sequence[str]) -> tuple[Turns, list[Turns]]:
    """Return the prompt that two texts begin with and the rest of each, or the turns of two transcripts."""
    texts = [text_of(text, name) for text, name in zip(said, columns, strict=True)]
    if all(_BEGINS_WITH_SPEAKER.match(text) for text in texts):
        divide = [_BY_PARAGRAPHS if _OF_HH_RLHF.match(text) else _BY_LINES for text in texts]
        return (), [_split(*side) for side in zip(texts, divide, columns, strict=True)]
    shared = _shared_words(*texts)
    if not shared.strip():
        raise Fault(_missing("prompt", columns))
    rests = [text_of(text[len(shared) :].lstrip(), name) for text, name in zip(texts, columns, strict=True)]
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
    differ = Fault("the turns before the responses differ between chosen and rejected.")
    for side, name in zip(sides, columns, strict=True):
        if side[-1].role != "assistant":
            raise Fault(
                f"column {name!r} ends in a {side[-1].role} turn; a response ends in the assistant's."
            )
    (asked, chosen), (asked_too, rejected) = _behind(before, sides[0]), _behind(before, sides[1])
    if not _alike(asked, asked_too):
        raise differ
    if asked and asked[-1].role == "user":
        for side, name in zip((chosen, rejected), columns, strict=True):
            if side[0].role in ("user", "system"):
                raise Fault(
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
        raise Fault(
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


def _with_system(prompt: Turns, value: Any, column: str) -> Turns:
    if value is None or (isinstance(value, str) and not value.strip()):
        return prompt
    system = Message("system", text_of(value, column))
    if prompt[0].role != "system":
        return (system, *prompt)
    if prompt[0] != system:
        raise Fault(f"column {column!r} says something else than the prompt's system turn.")
    return prompt


def _tools(value: Any, column: str) -> str:
    """Return the tools of a row as JSON text, empty where it has none."""
    if not value:
        return ""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise Fault(f"column {column!r} is no JSON: {error}.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Fault(f"column {column!r} holds no list of tools.")
    return text_of(_json_of(tools), column) if tools else ""


def _unless_plain(turns: Turns) -> Turns:
    return () if len(turns) == 1 and not turns[0].fields else turns


# A value → its turns or its text.


def _turns(value: Any, role: str, column: str) -> Turns:
    """Return the turns of messages; a text is one turn of `role`."""
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and turns and all(isinstance(item, dict) for item in turns):
        return tuple(_turn(item, column) for item in turns)
    return (Message(role, text_of(value, column)),)


def _turn(turn: dict[str, Any], column: str) -> Message:
    named, said = ("role", "content") if "role" in turn else ("from", "value")
    if not isinstance(turn.get(named), str):
        raise Fault(f"column {column!r} holds a turn without a role; found {', '.join(turn)}.")
    role = ROLES.get(turn[named].strip().lower())
    if role is None:
        raise Fault(
            f"column {column!r} holds a turn of the role {turn[named]!r}; known are {', '.join(ROLES)}."
        )
    fields = _fields(turn, (named, said), column) if len(turn) > 2 else ""
    content = _content(turn.get(said), column)
    if fields and content in (None, ""):
        # A tool may have nothing to say, and an assistant may only call one.
        silent = Message(role, "", fields)
        if role == "tool" or silent.said_in_fields():
            return silent
    return Message(role, text_of(content, column), fields)


def _fields(turn: dict[str, Any], known: tuple[str, str], column: str) -> str:
    more = {name: it for name, it in turn.items() if name not in known and it not in (None, "", [], {})}
    return text_of(_json_of(more), column) if more else ""


def _content(value: Any, column: str) -> Any:
    """Return the text of a list of parts joined, and any other content as it is."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise Fault(f"column {column!r} holds a part of the type {kind!r}; only text is read.")
    texts = [part.get("text") for part in value]
    return "".join(text_of(text, column) for text in texts if text != "")


def _split(text: str, divide: re.Pattern[str], column: str) -> Turns:
    """Return the turns of a transcript."""
    _, *parts = divide.split(text)
    return tuple(
        Message(ROLES[name.lower()], text_of(said, column).strip())
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _json_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
