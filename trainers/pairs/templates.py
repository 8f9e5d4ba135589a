"""Tokenizers and their chat templates: conversations become text, and what a template leaves out is detected.

A model without a template gets two marker tokens (paper §3): `<|user|>` and `<|assistant|>` before each turn, and
its end-of-sequence token, where it has one, after each response. Turns of any other role stand after `<|user|>`.
"""

import contextlib
import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError

from trainers.data.records import REASONING_FIELDS, Message
from trainers.errors import DataError, ModelError, SpecError
from trainers.specs import UNTRUSTED, System, Trust

# Templates that print today's date (Llama 3) would tokenise differently every day.
TEMPLATE_DATE = datetime.date(2024, 7, 26)

_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")

Start = TypeVar("Start", str, list[int])

USER_MARKER, ASSISTANT_MARKER = "<|user|>", "<|assistant|>"
_MARKED_TURNS = (
    "{{ begin }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ end }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_tokenizer(
    location: str, revision: str | None = None, trust: Trust = UNTRUSTED, template: str | None = None
) -> Any:
    """Load the tokenizer of a hub id or folder, with a chat template of markers where it has none. Raises ModelError.

    `template` comes from `given_template`.
    """
    from transformers import AutoTokenizer

    # A folder without code needs no trust, and transformers fails where its tokenizer_config.json names code.
    codeless = Path(location).is_dir() and not any(Path(location).rglob("*.py"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=revision, trust_remote_code=trust.trust_remote_code and not codeless
        )
    # The libraries raise anything for a file that they cannot read.
    except Exception as error:
        raise ModelError(f"no tokenizer could be loaded from {location}: {first_line(error)}") from error
    if not tokenizer.chat_template and template is None:
        _add_markers(tokenizer)
    return choose_template(tokenizer, template)


def given_template(text: str | None) -> str | None:
    """Return the value of --template, read from the file if it names one. Raises SpecError."""
    if text is None or "{" in text or not (text.endswith(".jinja") or Path(text).is_file()):
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SpecError(f"--template {text}: it cannot be read ({error}).") from error


def choose_template(tokenizer: Any, template: str | None) -> Any:
    """Set the tokenizer's chat template: a Jinja text, the name of one that it has, or None for its default.

    Raises ModelError.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    if template is None and (not isinstance(own, dict) or "default" in own):
        return tokenizer
    chosen = template if template and "{" in template else named.get(template)
    if chosen is None:
        missing = "several chat templates" if template is None else f"no chat template {template!r}"
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has {missing}; name one of its own, {', '.join(named) or 'none'}, "
            "or a Jinja file, with --template."
        )
    tokenizer.chat_template = chosen
    return tokenizer


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, with the next if it ends in a colon; else the error's type."""
    said = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
    lines = said.strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _add_markers(tokenizer: Any) -> None:
    starts = tokenizer("a")["input_ids"][:1]
    begins = tokenizer.bos_token_id is not None and starts == [tokenizer.bos_token_id]
    begin = f"{{%- set begin = {tokenizer.bos_token if begins else ''!r} -%}}"
    end = f"{{%- set end = {tokenizer.eos_token or ''!r} -%}}"
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [USER_MARKER, ASSISTANT_MARKER]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = begin + end + _MARKED_TURNS


# Words that stand in no template, and whose first letters differ.
_SENTINELS = ("A7f3q", "Z9k2w")
_LABELS = ("id", "type", "index")
_REASONING = re.compile(r"\A(?:(?!<think>).)*?</think>|<think>.*?</think>", re.DOTALL)

# What templates raise on turns of a form that they do not expect.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


def render(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = ""
) -> str:
    """Return a conversation as text; `tools` is a JSON list. Raises DataError where the template refuses it."""
    offered = json.loads(tools) if tools else None
    template = _dated(tokenizer.get_chat_template(tools=offered), tokenizer.name_or_path)
    in_parts = _takes_parts(template)

    def applied(arguments: Callable[[Any], Any]) -> str:
        turns = [_as_dict(message, arguments) for message in messages]
        for turn in turns if in_parts else ():
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        rendered: str = tokenizer.apply_chat_template(
            turns,
            tools=offered,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=TEMPLATE_DATE.strftime("%d %b %Y"),
            chat_template=template,
        )
        return rendered

    try:
        return applied(_parsed)
    except _REFUSALS as error:
        if any(message.fields for message in messages):
            with contextlib.suppress(*_REFUSALS):
                return applied(_as_text)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of the turns "
            f"{', '.join(message.role for message in messages)}: {error}"
        ) from error


@functools.cache
def _takes_parts(template: str) -> bool:
    """Whether a template writes contents that are lists of parts, and none that are texts."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def writes(content: Any) -> bool:
        turns = [{"role": role, "content": content} for role in ("user", "assistant")]
        with contextlib.suppress(*_REFUSALS):
            (text,), _ = render_jinja_template([turns], chat_template=template, bos_token="", eos_token="")
            return _SENTINELS[0] in text
        return False

    return not writes(_SENTINELS[0]) and writes([{"type": "text", "text": _SENTINELS[0]}])


def _as_dict(message: Message, arguments: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a turn as templates expect it: arguments of calls as objects (transformers), or as JSON texts (DeepSeek)."""
    turn = message.as_dict()
    for call in turn.get("tool_calls") or ():
        function = call.get("function", call)
        if "arguments" in function:
            function["arguments"] = arguments(function["arguments"])
    return turn


def response_start(
    tokenizer: Any, messages: Sequence[Message], wholes: Sequence[str], *, tools: str = ""
) -> str:
    """Return the text before the response, which is the same in every finished conversation of `wholes`.

    That is the generation prompt. Where finished conversations do not begin with it (R1-distill, Nemotron 3), it is what
    the template writes before the response's first word. Raises DataError.
    """
    prompt = render(tokenizer, messages, add_generation_prompt=True, tools=tools)
    if all(whole.startswith(prompt) for whole in wholes):
        return prompt
    plain = [
        render(tokenizer, (*messages, Message("assistant", said)), add_generation_prompt=False, tools=tools)
        for said in _SENTINELS
    ]
    start = shared_start([*plain, *wholes])
    # With reasoning in one response a template may begin it with one tag, and with another without.
    tags = [re.escape(str(token.content)) for token in tokenizer.added_tokens_decoder.values()]
    tag = re.compile("|".join(sorted(tags, key=len, reverse=True)) or r"(?!)")
    for found in itertools.chain.from_iterable(map(tag.finditer, wholes)):
        if found.start() < len(start) < found.end():
            start = start[: found.start()]
    return start


def before_answer(
    tokenizer: Any, messages: Sequence[Message], response: Sequence[Message], whole: str, *, tools: str
) -> str:
    """Return the start of `whole`, a finished conversation, up to the answer: the prompt and the reasoning.

    Raises DataError where a later turn of the response has reasoning, too.
    """
    first, *later = response
    if any(turn != without_reasoning(turn) for turn in later):
        raise DataError(
            "a response thinks again after its first turn, and --reasoning keep scores all that follows the beginning of "
            "its answer; use --reasoning score or drop."
        )
    answer = first.content.rpartition("</think>")[2].lstrip()
    marked = first._replace(content=first.content[: len(first.content) - len(answer)] + _SENTINELS[0])
    other = render(tokenizer, (*messages, marked, *later), add_generation_prompt=False, tools=tools)
    return shared_start([whole, other[: other.rfind(_SENTINELS[0])]])


def shared_start(texts: Sequence[Start]) -> Start:
    """Return what all the texts, or lists of tokens, begin with."""
    # What the first and the last in sorted order share, all share.
    first, last = min(texts), max(texts)
    size = next(
        (n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
    )
    return first[:size]


def without_reasoning(turn: Message) -> Message:
    """Return an assistant's turn without its reasoning: fields of that name, and the text up to </think>."""
    if turn.role != "assistant":
        return turn
    fields = json.loads(turn.fields) if turn.fields else {}
    kept = {name: value for name, value in fields.items() if name not in REASONING_FIELDS}
    content = _REASONING.sub("", turn.content, count=1) if "</think>" in turn.content else turn.content
    return Message(
        turn.role,
        content if content == turn.content else content.lstrip(),
        turn.fields if kept == fields else json.dumps(kept, ensure_ascii=False) if kept else "",
    )


def without_system(messages: Sequence[Message], system: System) -> tuple[Message, ...] | None:
    """Return a prompt without the system turns that it begins with: folded into the first user turn, or dropped.

    None where there are none, or where no user turn can take them.
    """
    count = next((n for n, turn in enumerate(messages) if turn.role != "system"), len(messages))
    rest = tuple(messages[count:])
    if system == "refuse" or not count or not rest or rest[0].role != "user":
        return None
    if system == "drop":
        return rest
    said = "\n\n".join([*(turn.content for turn in messages[:count]), rest[0].content])
    return (rest[0]._replace(content=said), *rest[1:])


def left_out(turns: Sequence[Message], text: str, prompt: str = "") -> str | None:
    """Name the first thing that `turns` say and `text` does not; None where `text` says all of it in order.

    The turns are a prompt's, or the response's to `prompt`, with which the text then begins. White space does not
    count, what is escaped as JSON does, and a system turn may stand anywhere. Templates drop the reasoning of turns
    before the last user turn on purpose, and some that between <think> and </think> of every turn of a prompt.
    """
    text, prompt = _squeezed(text), _squeezed(prompt)
    asked = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=0)
    at, fields = 0, ""
    for number, turn in enumerate(turns):
        ends = [at]
        for what, said in _said(turn, in_prompt=not prompt, before=not prompt and number < asked):
            if not said.strip():
                continue
            # In a response the prompt may hold the first words (`<think>`), and no more than these.
            starts = [
                (text.find(form, max(0 if turn.role == "system" else at, len(prompt) + 1 - len(form))), form)
                for form in _forms(said)
            ]
            found = [start + len(form) for start, form in starts if start >= 0]
            if not found:
                # A call that is left out may have been found in what later turns say.
                before = f" (or the {fields} before it)" if fields and what == "the text" else ""
                return f"{what} of the {turn.role} turn{before}: {' '.join(said.split())[:60]!r}"
            fields = fields if what == "the text" else what
            ends.append(min(found))
        if turn.role != "system":
            # Never behind the turn's true end, since everything is searched from the end of the turn before it.
            at = max(ends)
    return None


def tool_left_out(tools: str, text: str, without: str) -> str | None:
    """Name the first tool that `text` does not name more often than the same conversation `without` tools."""
    for tool in json.loads(tools):
        function = tool.get("function")
        name = str((function if isinstance(function, dict) else tool).get("name"))
        if text.count(name) <= without.count(name):
            return f"the tool {name}"
    return None


def _said(turn: Message, *, in_prompt: bool, before: bool) -> Iterator[tuple[str, str]]:
    """Yield (what it is, the text) of all that a template has to write of a turn; `before` the last user turn or not."""
    past = in_prompt and turn.role == "assistant" and "</think>" in turn.content
    for piece in _REASONING.split(turn.content) if past else [turn.content]:
        yield "the text", piece
    for name, value in turn.said_in_fields().items():
        if not (before and name in REASONING_FIELDS):
            for leaf in _leaves(value, _LABELS):
                yield name, leaf


def _leaves(value: Any, labels: Sequence[str]) -> Iterator[str]:
    """Yield the texts and numbers in a JSON value, as a template may write them; arguments may be JSON in a text."""
    match value:
        case dict():
            for key, inner in value.items():
                if key == "arguments":
                    yield from _leaves(_parsed(inner), ())
                elif key not in labels:
                    yield from _leaves(inner, labels)
        case list():
            for inner in value:
                yield from _leaves(inner, labels)
        case bool():
            # true or True
            yield str(value)[1:]
        case str() | int() | float():
            yield str(value)


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _forms(said: str) -> set[str]:
    """Return a text without white space, as it is and as templates write it into JSON."""
    escaped = (json.dumps(said.strip(), ensure_ascii=only_ascii)[1:-1] for only_ascii in (False, True))
    return {_squeezed(form) for form in (said, *escaped)}


@functools.cache
def _dated(template: str, name: str) -> str:
    """Replace every date that a template writes by a fixed one. Raises ModelError where that cannot be done."""
    pinned = _DATE_CALL.sub(lambda call: repr(TEMPLATE_DATE.strftime(call["format"])), template)
    if re.search(r"strftime_now\s*\(", pinned):
        raise ModelError(
            f"the chat template of {name} writes today's date in a format of its own making, so the same pair would "
            "be other tokens tomorrow; put a fixed date into its chat_template."
        )
    return pinned


def unknown_token(tokenizer: Any) -> int | None:
    """Return the id of words that the tokenizer does not know; None where that id also ends or begins texts (GPT-2)."""
    token = tokenizer.unk_token_id
    return None if token in (tokenizer.bos_token_id, tokenizer.eos_token_id) else token


def padding_token(tokenizer: Any) -> int:
    """Return an id that no response ends in, so that a reader of padded rows finds each response's last token.

    It is the tokenizer's own where possible, else another special token, else the first id that will do.
    """
    turns = (Message("user", "a"), Message("assistant", "a"))
    text = render(tokenizer, turns, add_generation_prompt=False)
    special = sorted(set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))
    ends = {tokenizer(text, add_special_tokens=False)["input_ids"][-1], tokenizer.eos_token_id}
    if not ends & set(special):
        # Where nothing ends a turn, an unknown word may be the last.
        ends.add(tokenizer.unk_token_id)
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special, *range(len(tokenizer))]
    return next(int(token) for token in candidates if token is not None and token not in ends)
