"""Rewriting responses by a model behind an OpenAI-compatible endpoint: a token-level shift, made (paper §2).

Chosen and rejected responses are rewritten independently; prompts are left alone. Each answer is checked and written
to the journal at once, so that nothing is paid for twice. The openai client itself repeats requests that fail for a
while (429, 5xx, time-outs), under the same idempotency key. After an answer that is no rewriting, the same is asked
under a new key.
"""

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trainers.data.known import generator, permutation
from trainers.data.records import Pair, as_row
from trainers.data.texts import UNKNOWN, language, looks_cut, token_overlap, words
from trainers.data.worlds import rewritten_by_rules
from trainers.errors import DataError, SpecError
from trainers.pairs.templates import first_line
from trainers.storage import disk_named, replace

PARAPHRASE = "paraphrase"
LANGUAGES = {
    "french": "fr",
    "spanish": "es",
    "german": "de",
    "italian": "it",
    "portuguese": "pt",
    "dutch": "nl",
    "english": "en",
}
MOST_CHRF = 90.0
LENGTH_RATIOS = (0.4, 2.5)

_PROMPTS = Path(__file__).parent / "prompts"
# Shorter texts may say the same in much more or fewer characters, or in the same ones.
_SHORT = 40
_REFUSAL = re.compile(
    r"^\W*(i'm|i am) (sorry|unable|not able)|^\W*(sorry|i),? (but )?i?\s?(cannot|can't|won't)\b|^\W*as an ai\b",
    re.I,
)
# Characters of a token: for estimates, and at the least, for what is set aside.
_CHARACTERS_OF_A_TOKEN, _LEAST_CHARACTERS = 3.5, 2.0
# How much longer a rewriting is than its original, for estimates.
_GROWTH = 1.2


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a model is asked."""

    endpoint: str | None = None
    """Base address, for example http://127.0.0.1:8000/v1 (default: $OPENAI_BASE_URL); its key is $OPENAI_API_KEY."""
    model: str | None = None
    """Name of the model at the endpoint."""
    max_tokens: int = 512
    """Most tokens of an answer; an answer that reaches them is cut off."""
    attempts: int = 3
    """Most answers to ask for before a response is listed as failed."""
    tries: int = 6
    """Most times to send a request that fails for a while (429, 5xx, time-outs)."""
    concurrency: int = 8
    """Requests at the same time."""
    timeout_s: float = 120.0
    """Seconds to wait for an answer."""
    input_price: float = 0.0
    """Price of a million tokens that the model reads."""
    output_price: float = 0.0
    """Price of a million tokens that the model writes."""
    max_cost: float | None = None
    """Most to spend, earlier runs included: refuse to start above it, and stop before a request could exceed it."""

    def require_valid(self) -> None:
        """Raise SpecError where no model can be asked so."""
        if not (self.endpoint or os.environ.get("OPENAI_BASE_URL")):
            raise SpecError("give --endpoint URL, or set OPENAI_BASE_URL.")
        if self.model is None:
            raise SpecError("--endpoint needs --model NAME.")
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise SpecError("--max-cost needs --input-price and --output-price, per million tokens.")
        for name in ("max_tokens", "attempts", "tries", "concurrency"):
            if getattr(self, name) < 1:
                raise SpecError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least 1.")

    def spending(self, prompt_tokens: float, completion_tokens: float) -> "Spending":
        """Return these numbers of tokens with their price."""
        cost = (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6
        return Spending(round(prompt_tokens), round(completion_tokens), cost)


class Spending(NamedTuple):
    """Tokens, and their price."""

    prompt_tokens: int
    completion_tokens: int
    cost: float

    def __str__(self) -> str:
        return f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens, cost {self.cost:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a model is asked to do: the prompt with {response} where the text goes, and the language code to expect."""

    prompt: str
    wanted: str | None = None

    def key(self, text: str, asking: Asking) -> str:
        """Return the name of a request: a hash of all that its answer depends on. Equal texts are asked for once."""
        asked = [self.prompt, asking.model, asking.max_tokens, text]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def task_for(into: str, own: Path | None, code: str | None) -> Task:
    """Return the task of rewriting `into` a paraphrase or a language; `own` is a file with a prompt. Raises SpecError."""
    if own is not None:
        if not own.is_file():
            raise SpecError(f"--prompt {own}: there is no such file.")
        prompt = own.read_text(encoding="utf-8")
        if "{response}" not in prompt:
            raise SpecError(f"--prompt {own} has no {{response}}, where the text to rewrite goes.")
    elif into == PARAPHRASE:
        prompt = (_PROMPTS / "paraphrase.txt").read_text(encoding="utf-8")
    elif into in LANGUAGES:
        words = (_PROMPTS / "translate.txt").read_text(encoding="utf-8")
        prompt = words.replace("{language}", into.capitalize())
    else:
        names = ", ".join((PARAPHRASE, *LANGUAGES))
        raise SpecError(f"--into {into} is not one of {names}; give --prompt FILE and --language CODE.")
    return Task(prompt=prompt, wanted=code or LANGUAGES.get(into))


# Is an answer a rewriting?


def measured(original: str, rewritten: str) -> dict[str, Any]:
    """Return the token overlap (in words, the paper's measure), chrF, length ratio and language of a rewriting."""
    tokens = words(original), words(rewritten)
    return {
        "overlap": token_overlap(*tokens),
        "self_overlap": token_overlap(tokens[0], tokens[0]),
        "chrf": _chrf(original, rewritten),
        "length_ratio": len(rewritten) / max(1, len(original)),
        "language": language(rewritten),
    }


def fault(original: str, rewritten: str, *, wanted: str | None, cut: bool = False) -> str | None:
    """Return why a rewriting cannot be used, or None. `wanted` is a language code, None for that of the original."""
    if not rewritten.strip():
        return "empty"
    if _REFUSAL.search(rewritten) and not _REFUSAL.search(original):
        return "refused"
    if cut or (looks_cut(rewritten) and not looks_cut(original)):
        return "cut off"
    chrf, ratio = _chrf(original, rewritten), len(rewritten) / max(1, len(original))
    if (chrf > MOST_CHRF and len(original) >= _SHORT) or rewritten.strip() == original.strip():
        return f"unchanged (chrF {chrf:.0f})"
    if len(original) >= _SHORT and not LENGTH_RATIOS[0] <= ratio <= LENGTH_RATIOS[1]:
        return f"{ratio:.2f} times as long"
    expected, found = wanted or language(original), language(rewritten)
    if UNKNOWN not in (expected, found) and found != expected:
        return f"in {found}, not {expected}"
    return None


@functools.cache
def _chrf_metric() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _chrf(original: str, rewritten: str) -> float:
    return float(_chrf_metric().sentence_score(rewritten, [original]).score)


# Asking.


class Answer(NamedTuple):
    """One answer to the request `key`; `fault` says why it cannot be used."""

    key: str
    text: str
    id: str
    fault: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal(dict[str, list[Answer]]):
    """The answers so far by request, from a file with a line for each; a line that is no answer was cut short by a kill."""

    def __init__(self, file: Path) -> None:
        self.file = file
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError, TypeError):
                answer = Answer(**json.loads(line))
                self.setdefault(answer.key, []).append(answer)

    def add(self, answer: Answer) -> None:
        """Keep an answer: it is on the disk when this returns."""
        self.setdefault(answer.key, []).append(answer)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with disk_named(self.file), self.file.open("a", encoding="utf-8") as stream:
            # A new line first, since the last one may have been cut short.
            stream.write("\n" + json.dumps(answer._asdict(), ensure_ascii=False))
            stream.flush()
            os.fsync(stream.fileno())

    def rewriting(self, key: str) -> str | None:
        """Return the first answer to a request that can be used."""
        return next((answer.text for answer in self.get(key, ()) if answer.fault is None), None)

    def spent(self, asking: Asking) -> Spending:
        """Return what the answers cost, used or not."""
        answers = [answer for found in self.values() for answer in found]
        return asking.spending(
            sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
        )


def missing_texts(texts: Iterable[str], task: Task, asking: Asking, journal: Journal) -> list[str]:
    """Return the distinct texts without a usable answer."""
    return [text for text in dict.fromkeys(texts) if journal.rewriting(task.key(text, asking)) is None]


def estimate(texts: Sequence[str], task: Task, asking: Asking) -> Spending:
    """Return about what rewriting each of `texts` once will take."""
    prompt = sum((len(task.prompt) + len(text)) / _CHARACTERS_OF_A_TOKEN for text in texts)
    completion = sum(min(asking.max_tokens, _GROWTH * len(text) / _CHARACTERS_OF_A_TOKEN) for text in texts)
    return asking.spending(prompt, completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The rewriting of each text that has one, why the others have none, and why asking stopped early, if it did."""

    answers: dict[str, str]
    why: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None


def rewrite_by_rules(texts: Iterable[str], rules: str) -> Outcome:
    """Rewrite every text by rule. Raises SpecError where there are no such rules."""
    return Outcome(answers={text: rewritten_by_rules(text, rules) for text in texts})


def rewrite_texts(texts: Sequence[str], task: Task, asking: Asking, journal: Journal) -> Outcome:
    """Ask for every text that has no usable answer in the journal. Raises DataError where no request can succeed."""
    why: dict[str, str] = {}
    stopped: str | None = None
    if missing := missing_texts(texts, task, asking, journal):
        # Load the metrics before the first request: it takes seconds, in which requests could time out.
        measured("a" * 100, "b" * 100)
        why, stopped = asyncio.run(_ask_for_all(missing, task, asking, journal))
    answers: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        key = task.key(text, asking)
        if (found := journal.rewriting(key)) is not None:
            answers[text] = found
        elif key in journal:
            why.setdefault(text, journal[key][-1].fault or "")
    return Outcome(answers=answers, why=why, stopped=stopped)


async def _ask_for_all(
    texts: Sequence[str], task: Task, asking: Asking, journal: Journal
) -> tuple[dict[str, str], str | None]:
    """Return why texts got no answer, and why asking stopped, if it did. Requests under way are awaited: they are paid for."""
    import openai

    gave_up: dict[str, str] = {}
    fatal: list[str] = []
    capped: list[str] = []
    under_way = 0
    slots = asyncio.Semaphore(asking.concurrency)
    # The most that a request can cost.
    longest = max(len(text.encode()) for text in texts)
    most = asking.spending((len(task.prompt) + longest) / _LEAST_CHARACTERS, asking.max_tokens).cost

    async def rewrite(text: str) -> None:
        nonlocal under_way
        key = task.key(text, asking)
        async with slots:
            while journal.rewriting(key) is None and len(journal.get(key, ())) < asking.attempts:
                cost = journal.spent(asking).cost + (under_way + 1) * most
                if asking.max_cost is not None and cost > asking.max_cost:
                    capped.append(f"the next request could pass --max-cost {asking.max_cost:.2f}")
                if capped or fatal:
                    return
                under_way += 1
                try:
                    journal.add(await _ask(client, text, key, task, asking, journal))
                except openai.APIError as error:
                    status = getattr(error, "status_code", None)
                    gave_up[text] = (
                        f"{client.base_url} answered {status} ({first_line(error)[:200]})"
                        if status
                        else first_line(error)[:200]
                    )
                    if status in (400, 409, 422):
                        gave_up[text] = f"declined: {gave_up[text]}"
                    elif error.code == "insufficient_quota" or (
                        status and status < 500 and status not in (408, 429)
                    ):
                        fatal.append(gave_up[text])
                    return
                finally:
                    under_way -= 1

    async with openai.AsyncOpenAI(
        base_url=asking.endpoint,
        api_key=os.environ.get("OPENAI_API_KEY") or "none",
        max_retries=asking.tries - 1,
        timeout=asking.timeout_s,
    ) as client:
        await asyncio.gather(*map(rewrite, texts))
    if fatal:
        raise DataError(f"{fatal[0]}. Check --endpoint, --model, OPENAI_API_KEY and its quota.")
    return gave_up, next(iter(capped), None)


async def _ask(client: Any, text: str, key: str, task: Task, asking: Asking, journal: Journal) -> Answer:
    try:
        said = await client.chat.completions.create(
            model=str(asking.model),
            messages=[{"role": "user", "content": task.prompt.replace("{response}", text)}],
            max_tokens=asking.max_tokens,
            extra_headers={"Idempotency-Key": f"{key}-{len(journal.get(key, ()))}"},
        )
        choice, usage = said.choices[0], said.usage
        rewritten, ended = choice.message.content or "", choice.finish_reason
        refused = ended == "content_filter" or getattr(choice.message, "refusal", None)
    # Broken JSON, or JSON that is no chat completion.
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return Answer(key, "", "", f"the answer cannot be read ({first_line(error)[:200]})")
    why = "refused" if refused else fault(text, rewritten, wanted=task.wanted, cut=ended == "length")
    # An endpoint that gives one answer to two requests mixed them up.
    others = (answer for other, found in journal.items() if other != key for answer in found)
    if why is None and any((other.id, other.text) == (said.id, rewritten) for other in others):
        why = "the answer to another request"
    tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    return Answer(key, rewritten, said.id or "", why, *tokens)


# The pairs that are rewritten, and the files that come of it.


def sampled(pairs: Sequence[Pair], sample: int | None, seed: int) -> list[tuple[int, Pair]]:
    """Return (row, pair) of a draw, in the set's order; of all where `sample` is None. Raises SpecError, DataError."""
    if sample is not None and sample < 1:
        raise SpecError(f"--sample {sample}: give at least 1.")
    for number, pair in enumerate(pairs):
        if any(len(turns) > 1 or turns[0].said_in_fields() for turns in pair.responses):
            raise DataError(
                f"pair {number}: a response has several turns, tool calls or reasoning beside its text; only plain "
                "texts are rewritten."
            )
    if sample is None or sample >= len(pairs):
        return list(enumerate(pairs))
    return [(row, pairs[row]) for row in sorted(permutation(len(pairs), generator(seed))[:sample])]


def responses_of(pairs: Sequence[tuple[int, Pair]]) -> list[str]:
    """Return every response, chosen before rejected."""
    return [text for _, pair in pairs for text in (pair.chosen, pair.rejected)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewritingResult:
    """How many of the pairs were rewritten, the means of what was measured, and the responses without a rewriting."""

    kept: int
    pairs: int
    means: dict[str, float]
    failures: list[dict[str, Any]]

    def __str__(self) -> str:
        said = f"{self.kept} of {self.pairs} pairs are rewritten"
        measures = (
            ": token overlap {overlap:.3f} (of the originals with themselves {self_overlap:.3f}), chrF {chrf:.1f}, "
            "{length_ratio:.2f} times as long"
        )
        return said + (measures.format(**self.means) if self.means else "")

    def said_failures(self) -> str:
        """Return how many responses have no usable rewriting, and the first of them."""
        said = "; ".join(f"row {item['row']}, {item['side']}: {item['why']}" for item in self.failures[:5])
        more = "; …" if len(self.failures) > 5 else ""
        return f"{len(self.failures)} responses have no usable rewriting ({said}{more})"


def write_rewritten(
    file: Path, pairs: Sequence[tuple[int, Pair]], outcome: Outcome, *, hygiene: Path, failures: Path
) -> RewritingResult:
    """Write the pairs whose responses both have a rewriting to `file`, as jsonl.

    `hygiene` gets the measures of each rewriting, `failures` the responses without one. Empty files are not written.
    """
    rows: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for row, pair in pairs:
        own = {"chosen": pair.chosen, "rejected": pair.rejected}
        made = {side: outcome.answers[text] for side, text in own.items() if text in outcome.answers}
        if len(made) == 2:
            was = {f"orig_{side}": text for side, text in own.items()}
            rows.append({**as_row(pair), **made, **was, "orig_index": row})
            lines += [{"row": row, "side": side, **measured(own[side], made[side])} for side in own]
        failed += [
            {"row": row, "side": side, "why": outcome.why.get(text, "not asked")}
            for side, text in own.items()
            if side not in made
        ]
    for place, found in ((failures, failed), (file, rows), (hygiene, lines)):
        if found:
            replace(place, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found))
        else:
            place.unlink(missing_ok=True)
    names = ("self_overlap", "overlap", "chrf", "length_ratio") if lines else ()
    means = {name: statistics.fmean(line[name] for line in lines) for name in names}
    return RewritingResult(kept=len(rows), pairs=len(pairs), means=means, failures=failed)
