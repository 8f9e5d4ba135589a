"""Preference pairs → tokens, and the file that keeps them.

A response is what the chat template adds after the generation prompt, its end-of-turn token included (paper §3). A
response of several turns (assistant, tool, assistant) counts whole, with the answers of tools.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
from pyarrow import compute as columns

from trainers.data.records import REASONING_FIELDS, Message, Pair
from trainers.errors import DataError, ModelError
from trainers.pairs.templates import (
    before_answer,
    left_out,
    render,
    response_start,
    shared_start,
    tool_left_out,
    unknown_token,
    without_reasoning,
    without_system,
)
from trainers.specs import DrawSpec, Rendering, ValidationSpec

# Enough to keep every thread of the tokenizer busy, and few enough for memory to stay flat.
_PAIRS_AT_ONCE = 256
_PAIRS_OF_A_BATCH = 1024
# Names and signs that a tokenizer lacks stay far below this share; above it, whole texts become one token repeated.
_MANY_UNKNOWN = 0.05
_Turns = Sequence[Message]
_PARTS = ("prompt", "chosen", "rejected")
_LISTS = (*_PARTS, "unscored")
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        *((part, pa.list_(pa.int32())) for part in _LISTS),
        ("margin", pa.float64()),
        ("tie", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """Token ids of one pair; `index` is its row in the source split, `margin` how much better chosen is, if the data say so.

    `unscored` are the numbers of tokens at the start of chosen and of rejected that are read but not scored.
    Of a `tie` neither response is preferred. The `rewriting` is the pair of the responses in other words; its index is −1 − `index`.
    """

    index: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    unscored: list[int] = field(default_factory=lambda: [0, 0])
    margin: float | None = None
    tie: bool = False
    rewriting: "TokenPair | None" = None

    @property
    def tokens(self) -> int:
        """Tokens of the packed pair, its prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer of its rows, each the prompt with a response."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def scored(self) -> tuple[list[int], list[int]]:
        """The tokens of each response that are scored."""
        return self.chosen[self.unscored[0] :], self.rejected[self.unscored[1] :]


def with_rewritings(pairs: Iterable[TokenPair]) -> Iterator[TokenPair]:
    """Yield every pair, followed by its rewriting if it has one."""
    return (one for pair in pairs for one in (pair, pair.rewriting) if one)


def write_tokens(tokens: Iterable[TokenPair], file: Path) -> int:
    """Write pairs to an Arrow file as they come, each before its rewriting, and return how many pairs there were."""
    count, rest = 0, with_rewritings(tokens)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while group := list(itertools.islice(rest, _PAIRS_OF_A_BATCH)):
            arrays = [
                pa.array([getattr(pair, field.name) for pair in group], field.type) for field in _SCHEMA
            ]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            count += sum(pair.index >= 0 for pair in group)
    return count


class TokenFile(Sequence[TokenPair]):
    """The pairs of a file that `write_tokens` wrote: it is memory-mapped, and a pair is built when it is asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self._index = table["index"].to_numpy()
        self._lists = {name: table[name] for name in _LISTS}
        self._more = {name: table[name] for name in ("margin", "tie")}
        self._rows = np.flatnonzero(self._index >= 0)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> TokenPair: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenPair]: ...
    def __getitem__(self, place: int | slice) -> TokenPair | list[TokenPair]:
        if isinstance(place, slice):
            return [self[number] for number in range(len(self))[place]]
        row = int(self._rows[range(len(self))[place]])
        rewritten = (self._index[row + 1 : row + 2] < 0).any()
        return self._pair(row, self._pair(row + 1) if rewritten else None)

    def _pair(self, row: int, rewriting: TokenPair | None = None) -> TokenPair:
        ids = {part: column[row].values.to_numpy().tolist() for part, column in self._lists.items()}
        more = {name: column[row].as_py() for name, column in self._more.items()}
        return TokenPair(index=int(self._index[row]), rewriting=rewriting, **more, **ids)

    def mean_tokens(self) -> dict[str, float]:
        """Return the mean lengths of prompts, chosen and rejected responses, rewritings included."""
        lengths = {part: columns.list_value_length(self._lists[part]) for part in _PARTS}
        return {part: columns.mean(length).as_py() for part, length in lengths.items()}

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        return type(self), (self.file,)


def draw_order(count: int, draw: DrawSpec) -> list[int]:
    """Return row numbers in the order in which they are tried: as stored, or a seeded permutation."""
    if draw.max_pairs is None:
        return list(range(count))
    if draw.permutation == "torch":
        import torch

        drawn: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(draw.seed)).tolist()
        return drawn
    return [int(row) for row in np.random.Generator(np.random.PCG64(draw.seed)).permutation(count)]


@dataclass(slots=True)
class Counts:
    """Counts of tokenised pairs.

    `too_long` pairs were left out. Among the pairs that were kept, `identical` have the same tokens on both sides;
    of their `tokens` (a prompt counted once), the tokenizer does not know `unknown_tokens`. Of the pairs that were
    rendered, the system turns of `without_system` were folded or dropped.
    """

    too_long: int = 0
    identical: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    without_system: int = 0

    @property
    def many_unknown(self) -> bool:
        """Whether so many tokens are unknown that a reward can hardly tell the texts apart."""
        return self.unknown_tokens > _MANY_UNKNOWN * self.tokens


def read_counts(noted: Mapping[str, Any]) -> Counts | None:
    """Return the counts that a manifest holds, or None where it holds none."""
    found = {field.name: noted[field.name] for field in fields(Counts) if field.name in noted}
    return Counts(**found) if "too_long" in found else None


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: Any, draw: DrawSpec, rendering: Rendering = "response"
) -> tuple[list[TokenPair], Counts]:
    """Return the drawn pairs as tokens, and their counts. Raises DataError, ModelError."""
    counts = Counts()
    return list(iter_tokens(pairs, tokenizer, draw, rendering, counts)), counts


def iter_tokens(
    pairs: Sequence[Pair], tokenizer: Any, draw: DrawSpec, rendering: Rendering, counts: Counts
) -> Iterator[TokenPair]:
    """Yield the drawn pairs as tokens, and add to `counts`. Raises DataError, ModelError.

    The limits are on prompt and response whatever the rendering, so that every reward type draws the same pairs.
    """
    kept, order, unknown = 0, draw_order(len(pairs), draw), unknown_token(tokenizer)
    for start in range(0, len(order), _PAIRS_AT_ONCE):
        rows = order[start : start + _PAIRS_AT_ONCE]
        found = [pairs[row] for row in rows]
        for pair, tokens in zip(found, _both(found, rows, tokenizer, draw, counts), strict=True):
            longest_response = max(
                len(side) for one in with_rewritings([tokens]) for side in (one.chosen, one.rejected)
            )
            if len(tokens.prompt) > draw.max_prompt_tokens or longest_response > draw.max_response_tokens:
                counts.too_long += 1
                continue
            made = tokens if rendering == "response" else _verification(pair, tokens.index, tokenizer, draw)
            # A verification ends in its answer, which always differs.
            end = -1 if rendering == "verification" else None
            counts.identical += made.chosen[:end] == made.rejected[:end]
            counts.tokens += made.tokens
            if unknown is not None:
                counts.unknown_tokens += sum(getattr(made, part).count(unknown) for part in _PARTS)
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
    """Return (pairs to train on, pairs to validate with), each in the order given. Raises DataError where one is empty."""
    if validation is None:
        return list(pairs), []
    pairs = list(pairs)
    # A tie has no ranking to be right about.
    ranked = [row for row, pair in enumerate(pairs) if not pair.tie]
    order = np.random.Generator(np.random.PCG64(validation.seed)).permutation(len(ranked))
    outside = {ranked[row] for row in order[: round(validation.share * len(ranked))]}
    if not 0 < len(outside) < len(pairs):
        raise DataError(
            f"a validation share of {validation.share} of {len(pairs)} pairs leaves one side empty."
        )
    return (
        [pair for row, pair in enumerate(pairs) if row not in outside],
        [pair for row, pair in enumerate(pairs) if row in outside],
    )


def _both(
    pairs: Sequence[Pair], rows: Sequence[int], tokenizer: Any, draw: DrawSpec, counts: Counts
) -> Iterator[TokenPair]:
    """Yield the pairs as tokens with their rewritings."""
    rewritten = {
        row: replace(
            pair, chosen=pair.rewritten[0], rejected=pair.rewritten[1], chosen_turns=(), rejected_turns=()
        )
        for pair, row in zip(pairs, rows, strict=True)
        if pair.rewritten
    }
    others: dict[int, TokenPair] = {}
    if rewritten:
        made = _tokenize(list(rewritten.values()), list(rewritten), tokenizer, draw, Counts())
        others = {tokens.index: replace(tokens, index=-1 - tokens.index) for tokens in made}
    for tokens in _tokenize(pairs, rows, tokenizer, draw, counts):
        yield replace(tokens, rewriting=others.get(tokens.index))


def _tokenize(
    pairs: Sequence[Pair], rows: Sequence[int], tokenizer: Any, draw: DrawSpec, counts: Counts
) -> Iterator[TokenPair]:
    rendered = [
        _rendered(pair.prompt, pair.responses, pair.tools, row, tokenizer, draw)
        for pair, row in zip(pairs, rows, strict=True)
    ]
    counts.without_system += sum(one.without_system for one in rendered)
    for pair, row, ids in zip(pairs, rows, _encoded(rendered, tokenizer), strict=True):
        for part, tokens in zip(("its prompt", "a response", "a response"), ids, strict=False):
            if not tokens:
                raise DataError(f"row {row}: {part} has no tokens under {tokenizer.name_or_path}.")
        # A token that is partly of the answer counts as the answer's.
        starts = zip(ids[1:], ids[3:], strict=False)
        unscored = [len(shared_start([whole[:-1], before])) for whole, before in starts]
        yield TokenPair(
            index=row,
            prompt=ids[0],
            chosen=ids[1],
            rejected=ids[2],
            unscored=unscored or [0, 0],
            margin=pair.margin,
            tie=pair.tie,
        )


class _Rendered(NamedTuple):
    """A prompt as text, what the template adds to it for each response, and whether it lost its system turns.

    With `--reasoning keep`, `added` also holds, for each response, its part before the answer.
    """

    prompt: str
    added: list[str]
    without_system: bool = False


def _rendered(
    messages: _Turns, responses: Sequence[_Turns], tools: str, row: int, tokenizer: Any, draw: DrawSpec
) -> _Rendered:
    responses = [_heard(turns, draw) for turns in responses]
    try:
        return _spans(messages, responses, tools, tokenizer, draw)
    except DataError as error:
        other = without_system(messages, draw.system)
        with contextlib.suppress(DataError):
            if other is not None:
                return _spans(other, responses, tools, tokenizer, draw)._replace(without_system=True)
        raise DataError(f"row {row}: {error}") from error


def _heard(turns: _Turns, draw: DrawSpec) -> _Turns:
    return [*map(without_reasoning, turns)] if draw.reasoning == "drop" else turns


def _spans(
    messages: _Turns, responses: Sequence[_Turns], tools: str, tokenizer: Any, draw: DrawSpec
) -> _Rendered:
    wholes = [
        render(tokenizer, (*messages, *response), add_generation_prompt=False, tools=tools)
        for response in responses
    ]
    prompt = response_start(tokenizer, messages, wholes, tools=tools)
    missing = left_out(messages, prompt)
    if tools and not missing:
        without = render(tokenizer, messages, add_generation_prompt=True)
        missing = tool_left_out(tools, prompt, without)
    for response, whole in zip(responses, wholes, strict=True):
        missing = missing or left_out(response, whole, prompt)
    if missing:
        thought = "think>" in missing or missing.startswith(REASONING_FIELDS)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} leaves out or moves {missing}; use a model whose template "
            f"writes it, or change the row{' (--reasoning drop leaves out what a response thinks)' if thought else ''}."
        )
    kept = zip(wholes, responses, strict=True) if draw.reasoning == "keep" else ()
    starts = [before_answer(tokenizer, messages, response, whole, tools=tools) for whole, response in kept]
    return _Rendered(prompt, [text[len(prompt) :] for text in (*wholes, *starts)])


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    # The template writes the begin-of-sequence token itself, so the tokenizer must not add another.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
        "input_ids"
    ]
    return ids


def _encoded(rendered: Sequence[_Rendered], tokenizer: Any) -> list[tuple[list[int], ...]]:
    """Return the tokens of each prompt, and those that each of its `added` adds to them."""
    # A tokenizer takes special tokens out of a text first, so that nothing merges across them.
    dividing = {
        number: str(token.content)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and not token.normalized
    }
    prompts = _encode([one.prompt for one in rendered], tokenizer)
    tails = [_tail(one.prompt, ids, dividing) for one, ids in zip(rendered, prompts, strict=True)]
    asked = [(*tail, added) for one, tail in zip(rendered, tails, strict=True) for added in one.added]
    pieces = _encode([text + added for text, _, added in asked], tokenizer)
    # Where tokens merge across the boundary, the response is tokenised alone, as a model generates it.
    responses = [
        piece[len(tail) :] if piece[: len(tail)] == tail else _encode([added], tokenizer)[0]
        for (_, tail, added), piece in zip(asked, pieces, strict=True)
    ]
    width = len(rendered[0].added)
    return list(zip(prompts, *(responses[number::width] for number in range(width)), strict=True))


def _tail(prompt: str, prompt_ids: list[int], dividing: dict[int, str]) -> tuple[str, list[int]]:
    """Return the prompt from its last special token on, as text and as tokens: all that a response could change."""
    place = next((n for n in reversed(range(len(prompt_ids))) if prompt_ids[n] in dividing), None)
    at = -1 if place is None else prompt.rfind(dividing[prompt_ids[place]])
    return (prompt, prompt_ids) if place is None or at < 0 else (prompt[at:], prompt_ids[place:])


def _verification(pair: Pair, row: int, tokenizer: Any, draw: DrawSpec) -> TokenPair:
    """Ask whether each response is correct, with "Yes" for the chosen and "No" for the other as answers (paper §3).

    What both conversations begin with becomes the prompt; an answer is one token, the last.
    """
    *before, last = pair.prompt
    if last.role != "user":
        raise DataError(
            f"row {row}: ex_grm asks about the answer to a user turn, and the prompt ends in a {last.role} turn; "
            "use another reward type, or change the row."
        )
    for text, turns in zip((pair.chosen, pair.rejected), pair.responses, strict=True):
        if missing := left_out(_heard(turns, draw), text):
            raise DataError(
                f"row {row}: ex_grm asks about a response's text, which leaves out {missing}; use another reward type, "
                "or change the row."
            )

    def asked(response: str) -> tuple[list[int], list[int]]:
        """Return the question with "Yes" and with "No", each up to the first token in which the answers differ."""
        question = (
            f"Question: {last.content}\nAnswer: {response}\nVerification: Is the answer correct (Yes/No)?"
        )
        messages = (*before, Message("user", question, last.fields))
        answers = [[Message("assistant", answer)] for answer in ("Yes", "No")]
        rendered = _rendered(messages, answers, pair.tools, row, tokenizer, draw)
        ((ids, yes, no, *_),) = _encoded([rendered], tokenizer)
        # Some templates begin every answer with tags of reasoning, or of a channel.
        at = next((n for n, (one, other) in enumerate(zip(yes, no, strict=False)) if one != other), None)
        if at is None:
            raise ModelError(f'{tokenizer.name_or_path} has one token for "Yes" and "No"; ex_grm needs two.')
        return [*ids, *yes[: at + 1]], [*ids, *no[: at + 1]]

    good, bad = _heard([Message("assistant", text) for text in (pair.chosen, pair.rejected)], draw)
    chosen, rejected = asked(good.content)[0], asked(bad.content)[1]
    # At least the answer is left on each side.
    shortest = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(shortest) if chosen[n] != rejected[n]), shortest)
    return TokenPair(index=row, prompt=chosen[:shared], chosen=chosen[shared:], rejected=rejected[shared:])
