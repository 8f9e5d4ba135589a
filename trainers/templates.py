"""Tokenizers made ready: a chat template for models that have none, and an id to pad with that ends no response.

A model without a template gets two marker tokens (paper §3): `<|user|>` and `<|assistant|>` before each turn, and
its end-of-sequence token, where it has one, after each response.
"""

import datetime
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from trainers.data.records import Message
from trainers.errors import DataError, ModelError
from trainers.folders import code_files
from trainers.specs import UNTRUSTED, Trust

# Templates that print today's date (Llama 3) would tokenise differently every day.
TEMPLATE_DATE = datetime.date(2024, 7, 26)

_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")

USER_MARKER, ASSISTANT_MARKER = "<|user|>", "<|assistant|>"
_MARKED_TURNS = (
    "{{ begin }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ end }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_tokenizer(location: str, revision: str | None = None, trust: Trust = UNTRUSTED) -> Any:
    """The tokenizer at a hub id or folder, with a chat template of markers where it has none. Raises ModelError."""
    from transformers import AutoTokenizer

    # A folder without code of its own needs no trust; where its tokenizer_config.json says so, transformers fails.
    codeless = Path(location).is_dir() and not code_files(Path(location))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=revision, trust_remote_code=trust.trust_remote_code and not codeless
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer could be loaded from {location}: {first_line(error)}") from error
    if not tokenizer.chat_template:
        _add_markers(tokenizer)
    return tokenizer


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _add_markers(tokenizer: Any) -> None:
    starts = tokenizer("a")["input_ids"][:1]
    begins = tokenizer.bos_token_id is not None and starts == [tokenizer.bos_token_id]
    begin = f"{{%- set begin = {tokenizer.bos_token if begins else ''!r} -%}}"
    end = f"{{%- set end = {tokenizer.eos_token or ''!r} -%}}"
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [USER_MARKER, ASSISTANT_MARKER]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = begin + end + _MARKED_TURNS


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """A conversation as text. Raises DataError where the template refuses it."""
    try:
        rendered: str = tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=TEMPLATE_DATE.strftime("%d %b %Y"),
            chat_template=_dated(tokenizer.get_chat_template(), tokenizer.name_or_path),
        )
    except TemplateError as error:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of the turns "
            f"{', '.join(message.role for message in messages)}: {error}"
        ) from error
    return rendered


@functools.cache
def _dated(template: str, name: str) -> str:
    """The template with every date that it writes pinned. Raises ModelError where one cannot be."""
    pinned = _DATE_CALL.sub(lambda call: repr(TEMPLATE_DATE.strftime(call["format"])), template)
    if re.search(r"strftime_now\s*\(", pinned):
        raise ModelError(
            f"the chat template of {name} writes today's date in a format of its own making, so the same pair would "
            "be other tokens tomorrow; put a fixed date into its chat_template."
        )
    return pinned


def unknown_token(tokenizer: Any) -> int | None:
    """The id that stands for words that the tokenizer does not know; None where it only ends or begins texts (GPT-2)."""
    token = tokenizer.unk_token_id
    return None if token in (tokenizer.bos_token_id, tokenizer.eos_token_id) else token


def padding_token(tokenizer: Any) -> int:
    """An id that no response ends in: a reader of padded rows then finds a response's last token by its id alone.

    The tokenizer's own where it will do (id 0 is an id); else another special token; else the first that will do.
    """
    turns = (Message("user", "a"), Message("assistant", "a"))
    text = render(tokenizer, turns, add_generation_prompt=False)
    special = sorted(set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))
    ends = {tokenizer(text, add_special_tokens=False)["input_ids"][-1], tokenizer.eos_token_id}
    if not ends & set(special):
        # Where nothing ends a turn, a word that the tokenizer does not know may.
        ends.add(tokenizer.unk_token_id)
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special, *range(len(tokenizer))]
    return next(int(token) for token in candidates if token is not None and token not in ends)
