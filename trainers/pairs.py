"""Preference pairs → tokens.

A response is what the chat template adds after the generation prompt, its end-of-turn token included (paper §3). Of
a response of several turns (assistant, tool, assistant) that is all of them, what the tool answered too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from trainers.data.known import generator, permutation
from trainers.data.records import Message, Pair
from trainers.errors import DataError, ModelError
from trainers.rewards import Rendering
from trainers.specs import DrawSpec, ValidationSpec
from trainers.templates import left_out, render, tool_left_out, unknown_token

# Enough for every thread of the tokenizer, few enough for memory to be flat.
_PAIRS_AT_ONCE = 256
# Names and signs that a tokenizer lacks stay far below; above it whole texts come to the model as one token repeated.
_MANY_UNKNOWN = 0.05


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
) -> tuple[list[TokenPair], "Counts"]:
    """The drawn pairs as tokens, and what was counted on the way. Raises DataError, ModelError."""
    counts = Counts()
    return list(iter_tokens(pairs, tokenizer, draw, rendering, counts)), counts


@dataclass(slots=True)
class Counts:
    """What tokenising has met so far: pairs left out as `too_long`; among the pairs kept, those `identical` on both
    sides, their `tokens` (a prompt counted once), and how many of these the tokenizer does not know.
    """

    too_long: int = 0
    identical: int = 0
    tokens: int = 0
    unknown_tokens: int = 0

    @property
    def many_unknown(self) -> bool:
        """Whether so many tokens are unknown that a reward can hardly be of the texts."""
        return self.unknown_tokens > _MANY_UNKNOWN * self.tokens

    def add(self, pair: TokenPair, rendering: Rendering, unknown: int | None) -> None:
        """Count a pair that is kept."""
        self.identical += identical(pair, rendering)
        self.tokens += pair.tokens
        if unknown is not None:
            self.unknown_tokens += sum(
                ids.count(unknown) for ids in (pair.prompt, pair.chosen, pair.rejected)
            )


def read_counts(noted: Mapping[str, Any]) -> Counts | None:
    """What was counted, from where it was noted; None where it was not."""
    names = [field.name for field in fields(Counts)]
    return Counts(**{name: noted[name] for name in names}) if all(name in noted for name in names) else None


def identical(pair: TokenPair, rendering: Rendering) -> bool:
    """Whether both sides are the same tokens, so that no model can prefer one; a verification ends in its answer."""
    end = -1 if rendering == "verification" else None
    return pair.chosen[:end] == pair.rejected[:end]


def iter_tokens(
    pairs: Sequence[Pair], tokenizer: Any, draw: DrawSpec, rendering: Rendering, counts: Counts
) -> Iterator[TokenPair]:
    """The drawn pairs as tokens, one by one. Raises DataError, ModelError.

    The limits are on prompt and response whatever the rendering, so that every reward type draws the same pairs.
    """
    kept, order, unknown = 0, draw_order(len(pairs), draw), unknown_token(tokenizer)
    for start in range(0, len(order), _PAIRS_AT_ONCE):
        rows = order[start : start + _PAIRS_AT_ONCE]
        found = [pairs[row] for row in rows]
        for pair, tokens in zip(found, _tokenize(found, rows, tokenizer), strict=True):
            longest_response = max(len(tokens.chosen), len(tokens.rejected))
            if len(tokens.prompt) > draw.max_prompt_tokens or longest_response > draw.max_response_tokens:
                counts.too_long += 1
                continue
            made = tokens if rendering == "response" else _verification(pair, tokens.index, tokenizer)
            counts.add(made, rendering, unknown)
            yield made
            kept += 1
            if kept == draw.max_pairs:
                return
    if not kept:
        raise DataError(
            f"all {counts.too_long} pairs are over the limit of {draw.max_prompt_tokens} prompt and "
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
    rendered = [
        _rendered(pair.prompt, pair.responses, pair.tools, row, tokenizer)
        for pair, row in zip(pairs, rows, strict=True)
    ]
    prompt_ids = _encode([prompt for prompt, _ in rendered], tokenizer)
    asked = []
    for (prompt, both), row, ids in zip(rendered, rows, prompt_ids, strict=True):
        if not ids:
            raise DataError(f"row {row}: its prompt has no tokens under {tokenizer.name_or_path}.")
        asked += [_Asked(row, prompt, ids, added) for added in both]
    responses = _responses(asked, tokenizer)
    return [
        TokenPair(index=row, prompt=ids, chosen=responses[2 * place], rejected=responses[2 * place + 1])
        for place, (row, ids) in enumerate(zip(rows, prompt_ids, strict=True))
    ]


def _rendered(
    messages: Sequence[Message], responses: Sequence[Sequence[Message]], tools: str, row: int, tokenizer: Any
) -> tuple[str, list[str]]:
    """The rendered prompt, and what the template adds to it for each response."""
    try:
        prompt = _prompt(messages, tools, tokenizer)
        return prompt, [_added(messages, prompt, response, tools, tokenizer) for response in responses]
    except DataError as error:
        raise DataError(f"row {row}: {error}") from error


def _prompt(messages: Sequence[Message], tools: str, tokenizer: Any) -> str:
    prompt = render(tokenizer, messages, add_generation_prompt=True, tools=tools)
    _require_whole(left_out(messages, prompt), tokenizer)
    if tools:
        without = render(tokenizer, messages, add_generation_prompt=True)
        _require_whole(tool_left_out(tools, prompt, without), tokenizer)
    return prompt


def _require_whole(missing: str | None, tokenizer: Any) -> None:
    if missing is not None:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} leaves out or moves {missing}; use a model whose template writes "
            "it, or change the row."
        )


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    # The template writes the begin-of-sequence token itself, so the tokenizer must not add another.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
        "input_ids"
    ]
    return ids


def _added(
    messages: Sequence[Message], prompt: str, response: Sequence[Message], tools: str, tokenizer: Any
) -> str:
    """What the template adds to the rendered prompt for a response."""
    whole = render(tokenizer, (*messages, *response), add_generation_prompt=False, tools=tools)
    if not whole.startswith(prompt):
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} does not begin a finished conversation with its own "
            "generation prompt, so a response cannot be told from its prompt; use a tokenizer whose template does."
        )
    _require_whole(left_out(response, whole, prompt), tokenizer)
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
    if last.role != "user":
        raise DataError(
            f"row {row}: ex_grm asks about the answer to a user turn, and the prompt ends in a {last.role} turn; "
            "use another reward type, or change the row."
        )
    for text, turns in zip((pair.chosen, pair.rejected), pair.responses, strict=True):
        if missing := left_out(turns, text):
            raise DataError(
                f"row {row}: ex_grm asks about a response's text, which leaves out {missing}; use another reward type, "
                "or change the row."
            )

    def asked(response: str, answer: str) -> list[int]:
        question = (
            f"Question: {last.content}\nAnswer: {response}\nVerification: Is the answer correct (Yes/No)?"
        )
        messages = (*before, Message("user", question, last.fields))
        answers = [[Message("assistant", answer)]]
        prompt, (added,) = _rendered(messages, answers, pair.tools, row, tokenizer)
        (ids,) = _encode([prompt], tokenizer)
        return [*ids, _responses([_Asked(row, prompt, ids, added)], tokenizer)[0][0]]

    chosen, rejected = asked(pair.chosen, "Yes"), asked(pair.rejected, "No")
    if chosen[-1] == rejected[-1]:
        raise ModelError(f'{tokenizer.name_or_path} has one token for "Yes" and "No"; ex_grm needs two.')
    # At least the answer is left on each side.
    shortest = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(shortest) if chosen[n] != rejected[n]), shortest)
    return TokenPair(index=row, prompt=chosen[:shared], chosen=chosen[shared:], rejected=rejected[shared:])
