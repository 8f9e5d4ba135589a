"""Preference pairs → tokens.

A response is what the chat template adds after the generation prompt, its end-of-turn token included (paper §3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trainers.data.records import Message, Pair
from trainers.data.selections import generator, permutation
from trainers.errors import DataError, ModelError
from trainers.rewards import Rendering
from trainers.specs import DrawSpec, ValidationSpec
from trainers.templates import render

# Enough for every thread of the tokenizer, few enough for memory to be flat.
_PAIRS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """Token ids of one pair; `index` is its row in the source split."""

    index: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of the packed pair, its prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def draw_order(count: int, draw: DrawSpec) -> list[int]:
    """Row numbers in the order in which they are tried: as stored, or a seeded permutation."""
    if draw.max_pairs is None:
        return list(range(count))
    if draw.permutation == "torch":
        return permutation(count, generator(draw.seed))
    return [int(row) for row in np.random.Generator(np.random.PCG64(draw.seed)).permutation(count)]


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: Any, draw: DrawSpec, rendering: Rendering = "response"
) -> tuple[list[TokenPair], int]:
    """The drawn pairs as tokens, and how many were left out for their length. Raises DataError, ModelError."""
    left_out = LeftOut()
    return list(iter_tokens(pairs, tokenizer, draw, rendering, left_out)), left_out.too_long


@dataclass(slots=True)
class LeftOut:
    """How many pairs were left out for their length, so far."""

    too_long: int = 0


def iter_tokens(
    pairs: Sequence[Pair], tokenizer: Any, draw: DrawSpec, rendering: Rendering, left_out: LeftOut
) -> Iterator[TokenPair]:
    """The drawn pairs as tokens, one by one. Raises DataError, ModelError.

    The limits are on prompt and response whatever the rendering, so that every reward type draws the same pairs.
    """
    kept, order = 0, draw_order(len(pairs), draw)
    for start in range(0, len(order), _PAIRS_AT_ONCE):
        rows = order[start : start + _PAIRS_AT_ONCE]
        found = [pairs[row] for row in rows]
        for pair, tokens in zip(found, _tokenize(found, rows, tokenizer), strict=True):
            longest_response = max(len(tokens.chosen), len(tokens.rejected))
            if len(tokens.prompt) > draw.max_prompt_tokens or longest_response > draw.max_response_tokens:
                left_out.too_long += 1
                continue
            yield tokens if rendering == "response" else _verification(pair, tokens.index, tokenizer)
            kept += 1
            if kept == draw.max_pairs:
                return
    if not kept:
        raise DataError(
            f"all {left_out.too_long} pairs are over the limit of {draw.max_prompt_tokens} prompt and "
            f"{draw.max_response_tokens} response tokens; nothing is left to use: raise "
            "--max-prompt-tokens or --max-response-tokens."
        )


def held_out(
    pairs: Sequence[TokenPair], validation: ValidationSpec | None
) -> tuple[list[TokenPair], list[TokenPair]]:
    """(pairs to train on, pairs to validate with), each in the order given. Raises DataError where one is empty."""
    if validation is None:
        return list(pairs), []
    order = np.random.Generator(np.random.PCG64(validation.seed)).permutation(len(pairs))
    outside = {int(row) for row in order[: round(validation.share * len(pairs))]}
    if not 0 < len(outside) < len(pairs):
        raise DataError(
            f"a validation share of {validation.share} of {len(pairs)} pairs leaves one side empty."
        )
    return (
        [pair for row, pair in enumerate(pairs) if row not in outside],
        [pair for row, pair in enumerate(pairs) if row in outside],
    )


class _Asked(NamedTuple):
    """A rendered prompt with its tokens, and what the template adds to it for a response."""

    row: int
    prompt: str
    prompt_ids: list[int]
    added: str


def _tokenize(pairs: Sequence[Pair], rows: Sequence[int], tokenizer: Any) -> list[TokenPair]:
    prompts = [render(tokenizer, pair.prompt, add_generation_prompt=True) for pair in pairs]
    prompt_ids = _encode(prompts, tokenizer)
    asked = []
    for pair, row, prompt, ids in zip(pairs, rows, prompts, prompt_ids, strict=True):
        if not ids:
            raise DataError(f"row {row}: its prompt has no tokens under {tokenizer.name_or_path}.")
        for text in (pair.chosen, pair.rejected):
            asked.append(_Asked(row, prompt, ids, _added(pair.prompt, prompt, text, tokenizer)))
    responses = _responses(asked, tokenizer)
    return [
        TokenPair(index=row, prompt=ids, chosen=responses[2 * place], rejected=responses[2 * place + 1])
        for place, (row, ids) in enumerate(zip(rows, prompt_ids, strict=True))
    ]


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    # The template writes the begin-of-sequence token itself, so the tokenizer must not add another.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
        "input_ids"
    ]
    return ids


def _added(messages: Sequence[Message], prompt: str, response: str, tokenizer: Any) -> str:
    """What the template adds to the rendered prompt for a response."""
    whole = render(tokenizer, (*messages, Message("assistant", response)), add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} does not begin a finished conversation with its own "
            "generation prompt, so a response cannot be told from its prompt; use a tokenizer whose template does."
        )
    return whole.removeprefix(prompt)


def _responses(asked: Sequence[_Asked], tokenizer: Any) -> list[list[int]]:
    """The tokens that each response adds to its prompt's."""
    dividing = _dividing_tokens(tokenizer)
    tails = [_tail(one.prompt, one.prompt_ids, dividing) for one in asked]
    pieces = _encode([text + one.added for (text, _), one in zip(tails, asked, strict=True)], tokenizer)
    found = []
    for one, (_, tail), piece in zip(asked, tails, pieces, strict=True):
        # Where the boundary merges: the response's own tokens, which follow the prompt when it is generated.
        ids = piece[len(tail) :] if piece[: len(tail)] == tail else _encode([one.added], tokenizer)[0]
        if not ids:
            raise DataError(f"row {one.row}: a response has no tokens under {tokenizer.name_or_path}.")
        found.append(ids)
    return found


def _dividing_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens: a tokenizer takes them out of a text first, so that nothing merges across them."""
    return {
        number: str(token.content)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and not token.normalized
    }


def _tail(prompt: str, prompt_ids: list[int], dividing: dict[int, str]) -> tuple[str, list[int]]:
    """The end of a prompt from its last special token on, as text and as tokens: all that a response could change."""
    place = next((n for n in reversed(range(len(prompt_ids))) if prompt_ids[n] in dividing), None)
    at = -1 if place is None else prompt.rfind(dividing[prompt_ids[place]])
    return (prompt, prompt_ids) if place is None or at < 0 else (prompt[at:], prompt_ids[place:])


def _verification(pair: Pair, row: int, tokenizer: Any) -> TokenPair:
    """The question whether each response is correct, answered "Yes" for the chosen and "No" for the other (paper §3).

    What both conversations begin with is the prompt; the answers are one token each, the last.
    """
    *before, last = pair.prompt

    def asked(response: str, answer: str) -> list[int]:
        question = (
            f"Question: {last.content}\nAnswer: {response}\nVerification: Is the answer correct (Yes/No)?"
        )
        messages = (*before, Message("user", question))
        prompt = render(tokenizer, messages, add_generation_prompt=True)
        (ids,) = _encode([prompt], tokenizer)
        return [
            *ids,
            _responses([_Asked(row, prompt, ids, _added(messages, prompt, answer, tokenizer))], tokenizer)[0][
                0
            ],
        ]

    chosen, rejected = asked(pair.chosen, "Yes"), asked(pair.rejected, "No")
    if chosen[-1] == rejected[-1]:
        raise ModelError(f'{tokenizer.name_or_path} has one token for "Yes" and "No"; ex_grm needs two.')
    # At least the answer is left on each side.
    shortest = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(shortest) if chosen[n] != rejected[n]), shortest)
    return TokenPair(index=row, prompt=chosen[:shared], chosen=chosen[shared:], rejected=rejected[shared:])
