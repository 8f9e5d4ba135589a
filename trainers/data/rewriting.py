"""Rewriting many texts by asking a model: at a rate, within a budget, each answer kept when it comes.

Faults that may pass (429, 5xx, time-outs, broken answers) are tried again under the same idempotency key; answers that
are no rewritings are asked for again under a new one. What an answer cost is counted whether it is used or not.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from trainers.data.journal import Answered, Journal
from trainers.errors import SpecError

# Characters of a token, for estimates; and at the least, for what is reserved.
_CHARACTERS_OF_A_TOKEN, _LEAST_CHARACTERS = 3.5, 2.0
# How much longer a rewriting is than its original, for estimates.
_GROWTH = 1.2
_LONGEST_PAUSE_S = 60.0


class Busy(Exception):
    """Asked too often: everybody waits `after_s` seconds, or as long as the asker sees fit."""

    def __init__(self, why: str, after_s: float | None) -> None:
        super().__init__(why)
        self.after_s = after_s


class Passing(Exception):
    """A fault that may pass."""


class Declined(Exception):
    """The endpoint will not take this request; nothing was paid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said, and what it cost."""

    text: str
    id: str
    cut: bool
    refused: bool
    prompt_tokens: int
    completion_tokens: int


# The text to rewrite and an idempotency key → an answer.
Ask = Callable[[str, str], Awaitable[Answer]]
# The original and an answer → why it cannot be used.
Check = Callable[[str, Answer], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How texts are rewritten. Prices are per million tokens; `max_cost` is in their currency."""

    prompt: str
    model: str
    max_tokens: int = 512
    attempts: int = 3
    tries: int = 6
    concurrency: int = 8
    requests_per_minute: float | None = None
    pause_s: float = 1.0
    input_price: float = 0.0
    output_price: float = 0.0
    max_cost: float | None = None
    max_tokens_total: int | None = None

    def __post_init__(self) -> None:
        if "{response}" not in self.prompt:
            raise SpecError("the prompt has no {response}, where the text to rewrite goes.")
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise SpecError("--max-cost needs --input-price and --output-price, per million tokens.")
        for name in ("max_tokens", "attempts", "tries", "concurrency"):
            if getattr(self, name) < 1:
                raise SpecError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least 1.")

    def key(self, text: str) -> str:
        """What a request is known by: all that its answer depends on. Equal texts are asked for once."""
        asked = [self.prompt, self.model, self.max_tokens, text]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Price of so many tokens."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """Tokens, and their price."""

    prompt_tokens: int
    completion_tokens: int
    cost: float

    @property
    def tokens(self) -> int:
        """Of both kinds."""
        return self.prompt_tokens + self.completion_tokens


def estimate(texts: Sequence[str], terms: Terms) -> Spending:
    """What rewriting `texts` once will take, about."""
    prompt = sum((len(terms.prompt) + len(text)) / _CHARACTERS_OF_A_TOKEN for text in texts)
    completion = sum(min(terms.max_tokens, _GROWTH * len(text) / _CHARACTERS_OF_A_TOKEN) for text in texts)
    return Spending(
        prompt_tokens=round(prompt), completion_tokens=round(completion), cost=terms.cost(prompt, completion)
    )


def spent(journal: Journal, terms: Terms) -> Spending:
    """What the answers in the journal took."""
    prompt, completion = journal.prompt_tokens, journal.completion_tokens
    return Spending(prompt_tokens=prompt, completion_tokens=completion, cost=terms.cost(prompt, completion))


def require_affordable(wanted: Spending, already: Spending, terms: Terms) -> None:
    """Raise SpecError where the estimate is over a cap, before anything is paid."""
    total, cost = already.tokens + wanted.tokens, already.cost + wanted.cost
    if terms.max_tokens_total is not None and total > terms.max_tokens_total:
        raise SpecError(
            f"about {total:,} tokens are needed ({already.tokens:,} of them paid before), over --max-tokens-total "
            f"{terms.max_tokens_total:,}; raise it, or rewrite fewer pairs with --sample."
        )
    if terms.max_cost is not None and cost > terms.max_cost:
        raise SpecError(
            f"about {cost:.2f} is needed ({already.cost:.2f} of it paid before), over --max-cost {terms.max_cost:.2f}; "
            "raise it, or rewrite fewer pairs with --sample."
        )


class _Run:
    """What the requests under way share: the pace, the budget, and whether to stop."""

    def __init__(self, terms: Terms, journal: Journal) -> None:
        self.terms, self.journal = terms, journal
        self.stopped: str | None = None
        self.gave_up: dict[str, str] = {}
        self._open_at = 0.0
        self._reserved_tokens, self._reserved_cost = 0, 0.0
        self._slots = asyncio.Semaphore(terms.concurrency)

    async def turn(self) -> None:
        """Wait for a request's turn."""
        clock = asyncio.get_running_loop().time
        while (wait := self._open_at - clock()) > 0:
            await asyncio.sleep(wait)
        if self.terms.requests_per_minute:
            self._open_at = clock() + 60.0 / self.terms.requests_per_minute

    def pause(self, seconds: float) -> None:
        """Nobody asks for so long."""
        self._open_at = max(self._open_at, asyncio.get_running_loop().time() + seconds)

    async def rewrite(self, text: str, ask: Ask, check: Check) -> None:
        """Ask until there is an answer that can be used, or attempts are used up."""
        key = self.terms.key(text)
        async with self._slots:
            while (
                not self.journal.accepted(key)
                and len(self.journal.of(key)) < self.terms.attempts
                and self._reserve(text)
            ):
                try:
                    answer = await self._asked(text, f"{key}-{len(self.journal.of(key))}", ask)
                except (Declined, Passing, Busy) as error:
                    self.gave_up[key] = str(error)
                    return
                finally:
                    self._release(text)
                self._keep(key, text, answer, check)

    def _keep(self, key: str, text: str, answer: Answer, check: Check) -> None:
        fault = "refused" if answer.refused else check(text, answer)
        if fault is None and self.journal.is_anothers(key, answer.id, answer.text):
            fault = "the answer to another request"
        self.journal.add(
            Answered(
                key=key,
                attempt=len(self.journal.of(key)),
                text=answer.text,
                id=answer.id,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                fault=fault,
            )
        )

    async def _asked(self, text: str, idempotency: str, ask: Ask) -> Answer:
        for number in range(self.terms.tries):
            await self.turn()
            try:
                return await ask(text, idempotency)
            except (Busy, Passing) as error:
                if number + 1 == self.terms.tries:
                    raise
                wait = min(self.terms.pause_s * 2**number, _LONGEST_PAUSE_S)
                if isinstance(error, Busy):
                    self.pause(wait if error.after_s is None else error.after_s)
                else:
                    await asyncio.sleep(wait)
        raise AssertionError("the last try raises")

    def _most(self, text: str) -> tuple[int, float]:
        prompt = (len(self.terms.prompt) + len(text.encode())) / _LEAST_CHARACTERS
        return round(prompt) + self.terms.max_tokens, self.terms.cost(prompt, self.terms.max_tokens)

    def _reserve(self, text: str) -> bool:
        """Set aside the most that a request can take; False, and no more is asked, where a cap forbids it."""
        if self.stopped is not None:
            return False
        tokens, cost = self._most(text)
        paid, terms = spent(self.journal, self.terms), self.terms
        most_tokens, most_cost = (
            paid.tokens + self._reserved_tokens + tokens,
            paid.cost + self._reserved_cost + cost,
        )
        if terms.max_tokens_total is not None and most_tokens > terms.max_tokens_total:
            self.stopped = f"the next request could pass --max-tokens-total {terms.max_tokens_total:,}"
        elif terms.max_cost is not None and most_cost > terms.max_cost:
            self.stopped = f"the next request could pass --max-cost {terms.max_cost:.2f}"
        else:
            self._reserved_tokens += tokens
            self._reserved_cost += cost
        return self.stopped is None

    def _release(self, text: str) -> None:
        tokens, cost = self._most(text)
        self._reserved_tokens -= tokens
        self._reserved_cost -= cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Why requests without a usable answer have none, by key; and why asking stopped, if it did before the end."""

    gave_up: dict[str, str]
    stopped: str | None


async def rewrite_all(
    texts: Sequence[str], terms: Terms, journal: Journal, ask: Ask, check: Check
) -> Outcome:
    """Ask for every text that has no usable answer in the journal. Raises what `ask` raises for all requests alike.

    Requests under way when one raises are waited for: their answers are paid.
    """
    run = _Run(terms, journal)

    async def one(text: str) -> None:
        try:
            await run.rewrite(text, ask, check)
        except BaseException as error:
            run.stopped = run.stopped or str(error)
            raise

    missing = [text for text in dict.fromkeys(texts) if journal.accepted(terms.key(text)) is None]
    ended = await asyncio.gather(*(one(text) for text in missing), return_exceptions=True)
    for error in ended:
        if isinstance(error, BaseException):
            raise error
    faults = {
        key: answers[-1].fault or ""
        for key in map(terms.key, missing)
        if (answers := journal.of(key)) and journal.accepted(key) is None
    }
    return Outcome(gave_up={**faults, **run.gave_up}, stopped=run.stopped)
