"""Rewriting by a causal chat model on this machine: answers are journaled batch by batch, so that none is asked for twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainers.data.journal import Answered, Journal
from trainers.data.records import Message
from trainers.data.rewriting import Terms
from trainers.errors import OutOfMemory, SpecError
from trainers.generation import generate
from trainers.templates import render

# Answers at once, on a GPU and without one; halved where they do not fit.
_BATCH_GPU, _BATCH_CPU = 64, 16

# The original, an answer, and whether the answer was cut → why it cannot be used.
Check = Callable[[str, str, bool], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How answers are drawn: temperature 0 takes the likeliest token each time."""

    temperature: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A causal model with its tokenizer, and the tokens that end its turn."""

    model: Any
    tokenizer: Any
    ends: frozenset[int]


def require_drawable(terms: Terms, drawing: Drawing) -> None:
    """Raise SpecError where answers cannot be drawn, or would be drawn again in vain."""
    if not 0 <= drawing.temperature < float("inf"):
        raise SpecError(f"--temperature {drawing.temperature}: give 0 or a positive number.")
    if drawing.temperature == 0 and terms.attempts > 1:
        raise SpecError(
            f"--temperature 0 gives the same answer each of {terms.attempts} times; give --attempts 1."
        )


def turn_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """What a model may end its turn with: its end of text, and the first special token after a turn in its template."""
    said = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id} - {None}
    turns = (Message("user", "a"), Message("assistant", "b"))
    asked = render(tokenizer, turns[:1], add_generation_prompt=True)
    after = render(tokenizer, turns, add_generation_prompt=False).removeprefix(asked).partition("b")[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    closing = [token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in special]
    return frozenset({*ends, *closing[:1]})


def rewrite_locally(
    texts: Sequence[str],
    terms: Terms,
    drawing: Drawing,
    journal: Journal,
    load: Callable[[], Writer],
    check: Check,
    say: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, str]:
    """Ask for every text that has no usable answer in the journal, until it has or its attempts are used up.

    The model is loaded where there is anything to ask. Returns why texts without a usable answer have none, by key.
    `say` hears how many of the texts asked about are settled.
    """
    require_drawable(terms, drawing)
    distinct = list(dict.fromkeys(texts))
    wanted = [text for text in distinct if _is_open(text, terms, journal)]
    too_long: dict[str, str] = {}
    if wanted:
        writer = load()
        asked = {text: _asked(text, terms, writer.tokenizer) for text in wanted}
        most = getattr(writer.model.config, "max_position_embeddings", None)
        too_long = {
            terms.key(
                text
            ): f"{len(tokens)} tokens to read and {terms.max_tokens} to write are over the model's {most}"
            for text, tokens in asked.items()
            if most is not None and len(tokens) + terms.max_tokens > most
        }
        _ask_all(
            {t: ids for t, ids in asked.items() if terms.key(t) not in too_long},
            terms,
            drawing,
            journal,
            writer,
            check,
            say,
        )
    faults = {
        key: answers[-1].fault or ""
        for key in map(terms.key, distinct)
        if journal.accepted(key) is None and (answers := journal.of(key))
    }
    return {**faults, **too_long}


def _ask_all(
    asked: dict[str, list[int]],
    terms: Terms,
    drawing: Drawing,
    journal: Journal,
    writer: Writer,
    check: Check,
    say: Callable[[int, int], None],
) -> None:
    """Batch by batch, texts of like length together; those without a usable answer come round again."""
    size = _BATCH_GPU if writer.model.device.type == "cuda" else _BATCH_CPU
    while left := [text for text in asked if _is_open(text, terms, journal)]:
        waiting = sorted(left, key=lambda text: len(asked[text]))
        while waiting:
            some = waiting[:size]
            try:
                answers = _answers(some, asked, terms, drawing, journal, writer)
            except OutOfMemory:
                if size == 1:
                    raise
                size //= 2
                continue
            for text, tokens in zip(some, answers, strict=True):
                _keep(text, tokens, terms, journal, writer, len(asked[text]), check)
            waiting = waiting[size:]
            say(sum(not _is_open(text, terms, journal) for text in asked), len(asked))


def _is_open(text: str, terms: Terms, journal: Journal) -> bool:
    key = terms.key(text)
    return journal.accepted(key) is None and len(journal.of(key)) < terms.attempts


def _asked(text: str, terms: Terms, tokenizer: Any) -> list[int]:
    turn = Message("user", terms.prompt.replace("{response}", text))
    prompt = render(tokenizer, (turn,), add_generation_prompt=True)
    # The template writes the begin-of-sequence token itself.
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids


def _answers(
    texts: Sequence[str],
    asked: dict[str, list[int]],
    terms: Terms,
    drawing: Drawing,
    journal: Journal,
    writer: Writer,
) -> list[list[int]]:
    drawn = generate(
        writer.model,
        [asked[text] for text in texts],
        end=writer.ends,
        samples=1,
        temperature=drawing.temperature,
        max_new_tokens=terms.max_tokens,
        seed=drawing.seed,
        batch=len(texts),
    )
    return [answer for (answer,) in drawn]


def _keep(
    text: str, tokens: list[int], terms: Terms, journal: Journal, writer: Writer, read: int, check: Check
) -> None:
    key, said = terms.key(text), writer.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    attempt = len(journal.of(key))
    journal.add(
        Answered(
            key=key,
            attempt=attempt,
            text=said,
            id=f"{key}-{attempt}",
            prompt_tokens=read,
            completion_tokens=len(tokens),
            fault=check(text, said, len(tokens) >= terms.max_tokens),
        )
    )
