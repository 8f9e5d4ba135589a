"""Rewriting responses by a model behind an OpenAI-compatible endpoint: a token-level shift, made (paper §2).

Chosen and rejected responses are rewritten independently; prompts are left alone. Each answer is checked and written
to the journal at once, so that nothing is paid for twice. The openai client itself repeats requests that fail for a
while (429, 5xx, time-outs), under the same idempotency key. After an answer that is no rewriting, the same is asked
under a new key.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from trainers.command import make_folder
from trainers.data.known import SUBSET_SEED, generator, permutation
from trainers.data.records import Pair, as_row
from trainers.data.sources import NamedSet, Reading, chosen_spec, own_split, read_pairs, said_left_out
from trainers.data.texts import UNKNOWN, language, looks_cut, token_overlap, words
from trainers.errors import DataError, SpecError, TrialFailed
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
    r"^\W*(i['’]m|i am) (sorry|unable|not able)|^\W*(sorry|i),? (but )?i?\s?(cannot|can['’]t|won['’]t)\b|^\W*as an ai\b",
    re.I,
)
# Characters of a token: for estimates, and at the least, for what is set aside.
_CHARACTERS_OF_A_TOKEN, _LEAST_CHARACTERS = 3.5, 2.0
# How much longer a rewriting is than its original, for estimates.
_GROWTH = 1.2
# Most times to send a request that fails for a while.
_TRIES = 6
_MEASURES = ("self_overlap", "overlap", "chrf", "length_ratio")
_SAID = (
    "token overlap {overlap:.3f} (of the originals with themselves {self_overlap:.3f}), chrF {chrf:.1f}, "
    "{length_ratio:.2f} times as long"
)


class Spending(NamedTuple):
    """Tokens, and their price."""

    prompt_tokens: int
    completion_tokens: int
    cost: float

    def __str__(self) -> str:
        cost = f", cost {self.cost:.2f}" if self.cost else ""
        return f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens{cost}"


# Is an answer a rewriting?


def measured(original: str, rewritten: str) -> dict[str, Any]:
    """Return the token overlap (in words, the paper's measure), chrF, length ratio and language of a rewriting."""
    from sacrebleu import sentence_chrf

    tokens = words(original), words(rewritten)
    return {
        "overlap": token_overlap(*tokens),
        "self_overlap": token_overlap(tokens[0], tokens[0]),
        "chrf": sentence_chrf(rewritten, [original]).score,
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
    found = measured(original, rewritten)
    chrf, ratio, said_in = found["chrf"], found["length_ratio"], found["language"]
    if (chrf > MOST_CHRF and len(original) >= _SHORT) or rewritten.strip() == original.strip():
        return f"unchanged (chrF {chrf:.0f})"
    if len(original) >= _SHORT and not LENGTH_RATIOS[0] <= ratio <= LENGTH_RATIOS[1]:
        return f"{ratio:.2f} times as long"
    expected = wanted or language(original)
    if UNKNOWN not in (expected, said_in) and said_in != expected:
        return f"in {said_in}, not {expected}"
    return None


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
        with disk_named(self.file), self.file.open("a", encoding="utf-8") as stream:
            # A new line first, since the last one may have been cut short.
            stream.write("\n" + json.dumps(answer._asdict(), ensure_ascii=False))
            stream.flush()
            os.fsync(stream.fileno())

    def rewriting(self, key: str) -> str | None:
        """Return the first answer to a request that can be used."""
        return next((answer.text for answer in self.get(key, ()) if answer.fault is None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriter:
    """Asks a model: `prompt` has {response} where the text goes, `wanted` is the language code to expect."""

    prompt: str
    wanted: str | None
    asking: "Rewrite"
    journal: Journal

    def key(self, text: str) -> str:
        """Return the name of a request: a hash of all that its answer depends on. Equal texts are asked for once."""
        asked = [self.prompt, self.asking.model, self.asking.max_tokens, text]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct texts without a usable answer."""
        return [text for text in dict.fromkeys(texts) if self.journal.rewriting(self.key(text)) is None]

    def spent(self) -> Spending:
        """Return what the answers so far cost, used or not."""
        answers = [answer for found in self.journal.values() for answer in found]
        return self.asking.spending(
            sum(answer.prompt_tokens for answer in answers),
            sum(answer.completion_tokens for answer in answers),
        )

    def estimate(self, texts: Sequence[str]) -> Spending:
        """Return about what rewriting each of `texts` once will take."""
        read = sum((len(self.prompt) + len(text)) / _CHARACTERS_OF_A_TOKEN for text in texts)
        lengths = (_GROWTH * len(text) / _CHARACTERS_OF_A_TOKEN for text in texts)
        return self.asking.spending(read, sum(min(self.asking.max_tokens, length) for length in lengths))

    def rewrite(self, texts: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Ask for every text that is missing; return the rewritings, and why other texts have none. Raises DataError."""
        why: dict[str, str] = {}
        if missing := self.missing(texts):
            # Load the metrics before the first request: it takes seconds, in which requests could time out.
            measured("a" * 100, "b" * 100)
            asyncio.run(self._ask_for_all(missing, why))
        answers = {text: self.journal.rewriting(self.key(text)) for text in texts}
        for text in missing:
            if found := self.journal.get(self.key(text)):
                why.setdefault(text, found[-1].fault or "")
        return {text: answer for text, answer in answers.items() if answer is not None}, why

    async def _ask_for_all(self, texts: Sequence[str], why: dict[str, str]) -> None:
        """Ask, and note why texts got no answer. Requests under way are awaited: they are paid for."""
        import openai

        asking, fatal, under_way = self.asking, list[str](), 0
        slots = asyncio.Semaphore(asking.concurrency)
        # The most that a request can cost.
        longest = max(len(text.encode()) for text in texts)
        most = asking.spending((len(self.prompt) + longest) / _LEAST_CHARACTERS, asking.max_tokens).cost

        async def rewrite(text: str) -> None:
            nonlocal under_way
            key = self.key(text)
            async with slots:
                while len(self.journal.get(key, ())) < asking.attempts and not fatal:
                    if self.journal.rewriting(key) is not None:
                        return
                    cost = self.spent().cost + (under_way + 1) * most
                    if asking.max_cost is not None and cost > asking.max_cost:
                        why[text] = f"the next request could pass --max-cost {asking.max_cost:.2f}"
                        return
                    under_way += 1
                    try:
                        self.journal.add(await self._ask(client, text))
                    except openai.APIError as error:
                        status = getattr(error, "status_code", None)
                        answered = f"{client.base_url} answered {status}: " if status else ""
                        why[text] = answered + first_line(error)[:200]
                        # The key, the model's name, the address or the quota: no other request would fare better.
                        if status in range(401, 406) or error.code == "insufficient_quota":
                            fatal.append(why[text])
                        return
                    finally:
                        under_way -= 1

        async with openai.AsyncOpenAI(
            base_url=asking.endpoint,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=_TRIES - 1,
            timeout=asking.timeout_s,
        ) as client:
            await asyncio.gather(*map(rewrite, texts))
        if fatal:
            raise DataError(f"{fatal[0]}. Check --endpoint, --model, OPENAI_API_KEY and its quota.")

    async def _ask(self, client: Any, text: str) -> Answer:
        key = self.key(text)
        try:
            said = await client.chat.completions.create(
                model=str(self.asking.model),
                messages=[{"role": "user", "content": self.prompt.replace("{response}", text)}],
                max_tokens=self.asking.max_tokens,
                extra_headers={"Idempotency-Key": f"{key}-{len(self.journal.get(key, ()))}"},
            )
            choice, usage = said.choices[0], said.usage
            rewritten, ended = choice.message.content or "", choice.finish_reason
            refused = ended == "content_filter" or getattr(choice.message, "refusal", None)
        # Broken JSON, or JSON that is no chat completion.
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            return Answer(key, "", "", f"the answer cannot be read ({first_line(error)[:200]})")
        why = "refused" if refused else fault(text, rewritten, wanted=self.wanted, cut=ended == "length")
        # An endpoint that gives one answer to two requests mixed them up.
        others = (answer for other, found in self.journal.items() if other != key for answer in found)
        if why is None and any((other.id, other.text) == (said.id, rewritten) for other in others):
            why = "the answer to another request"
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        return Answer(key, rewritten, said.id or "", why, *tokens)


# The command.


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Rewrite the responses of a set by a model behind an OpenAI-compatible endpoint.

    Beside OUT (prompt, chosen, rejected, orig_chosen, orig_rejected, orig_index) stand OUT.journal.jsonl with
    every answer that was paid for, from which the same command goes on; OUT.hygiene.jsonl with overlap, chrF,
    length ratio and language of every response; and OUT.failures.jsonl with the responses that have no usable
    answer, and why.
    """

    data: NamedSet
    """A known name, a file, a folder or a hub id."""
    out: Path
    """File to write, .jsonl."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    split: str = "test"
    """The split to rewrite."""
    into: str = PARAPHRASE
    """paraphrase, or a language: french, spanish, german, …"""
    endpoint: str | None = None
    """Base address, for example http://127.0.0.1:8000/v1 (default: $OPENAI_BASE_URL); its key is $OPENAI_API_KEY."""
    model: str | None = None
    """Name of the model at the endpoint."""
    max_tokens: int = 512
    """Most tokens of an answer; an answer that reaches them is cut off."""
    attempts: int = 3
    """Most answers to ask for before a response is listed as failed."""
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
    prompt: Path | None = None
    """File with your own prompt, with {response} where the text goes."""
    language: str | None = None
    """Language code that an answer must have, where --into does not say it."""
    sample: int | None = None
    """Rewrite this many pairs, drawn as in the paper, in the set's order."""
    estimate: bool = False
    """Print the estimated cost and ask nothing."""

    def run(self) -> None:
        """Rewrite, or go on. Raises SweepError; TrialFailed where responses are left without a usable answer."""
        out = self.out
        self._require_valid()
        prompt = self._prompt()
        if out.suffix != ".jsonl":
            raise SpecError(f"--out {out}: name a .jsonl file.")
        spec, left_out = chosen_spec(self.data, self.reading), list[str]()
        pairs = _sampled(read_pairs(spec, own_split(spec, self.split), left_out), self.sample)
        print(end=said_left_out(left_out))
        texts = [text for _, pair in pairs for text in (pair.chosen, pair.rejected)]
        make_folder(out.parent)
        journal = Journal(out.with_name(f"{out.name}.journal.jsonl"))
        if out.exists() and not journal:
            raise SpecError(f"--out {out} is there, and no rewriting: it has no journal. Give another file.")
        wanted = self.language or LANGUAGES.get(self.into)
        rewriter = Rewriter(prompt=prompt, wanted=wanted, asking=self, journal=journal)
        missing, paid = rewriter.missing(texts), rewriter.spent()
        needed = rewriter.estimate(missing)
        print(f"{len(missing)} responses to rewrite, about {needed}; paid before: {paid}")
        if self.max_cost is not None and paid.cost + needed.cost > self.max_cost:
            raise SpecError(
                f"about {needed.cost:.2f} is needed and {paid.cost:.2f} was paid before, over --max-cost "
                f"{self.max_cost:.2f}; raise it, or rewrite fewer pairs with --sample."
            )
        if self.estimate:
            return
        answers, why = rewriter.rewrite(texts)
        print(f"paid: {rewriter.spent()}")
        _write(out, pairs, answers, why)

    def _require_valid(self) -> None:
        """Raise SpecError where no model can be asked so."""
        if not (self.endpoint or os.environ.get("OPENAI_BASE_URL")):
            raise SpecError("give --endpoint URL, or set OPENAI_BASE_URL.")
        if self.model is None:
            raise SpecError("--endpoint needs --model NAME.")
        if self.language and not re.fullmatch("[a-z]{2}", self.language):
            raise SpecError(f"--language {self.language}: give a code of two letters, for example fr.")
        if self.max_cost is not None and not (self.input_price and self.output_price):
            raise SpecError("--max-cost needs --input-price and --output-price, per million tokens.")
        for name in ("max_tokens", "attempts", "concurrency", "sample"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SpecError(f"--{name.replace('_', '-')} {value}: give at least 1.")

    def spending(self, prompt_tokens: float, completion_tokens: float) -> Spending:
        """Return these numbers of tokens with their price."""
        cost = (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6
        return Spending(round(prompt_tokens), round(completion_tokens), cost)

    def _prompt(self) -> str:
        if self.prompt is not None:
            if not self.prompt.is_file():
                raise SpecError(f"--prompt {self.prompt}: there is no such file.")
            prompt = self.prompt.read_text(encoding="utf-8")
            if "{response}" not in prompt:
                raise SpecError(
                    f"--prompt {self.prompt} has no {{response}}, where the text to rewrite goes."
                )
            return prompt
        if self.into not in (PARAPHRASE, *LANGUAGES):
            names = ", ".join((PARAPHRASE, *LANGUAGES))
            raise SpecError(
                f"--into {self.into} is not one of {names}; give --prompt FILE and --language CODE."
            )
        own = _PROMPTS / ("paraphrase.txt" if self.into == PARAPHRASE else "translate.txt")
        return own.read_text(encoding="utf-8").replace("{language}", self.into.capitalize())


def _sampled(pairs: Sequence[Pair], sample: int | None) -> list[tuple[int, Pair]]:
    """Return (row, pair) of a draw, in the set's order; of all where `sample` is None. Raises DataError."""
    for number, pair in enumerate(pairs):
        if any(len(turns) > 1 or turns[0].said_in_fields() for turns in pair.responses):
            raise DataError(
                f"pair {number}: a response has several turns, tool calls or reasoning beside its text; only plain "
                "texts are rewritten."
            )
    rows = range(len(pairs)) if sample is None else permutation(len(pairs), generator(SUBSET_SEED))[:sample]
    return [(row, pairs[row]) for row in sorted(rows)]


def _write(
    out: Path, pairs: Sequence[tuple[int, Pair]], answers: dict[str, str], why: dict[str, str]
) -> None:
    """Write the pairs whose responses both have a rewriting, what was measured of them, and what has none.

    Empty files are not written. Raises TrialFailed where responses have none.
    """
    rows: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for row, pair in pairs:
        own = {"chosen": pair.chosen, "rejected": pair.rejected}
        made = {side: answers[text] for side, text in own.items() if text in answers}
        if len(made) == 2:
            was = {f"orig_{side}": text for side, text in own.items()}
            rows.append({**as_row(pair), **made, **was, "orig_index": row})
            lines += [{"row": row, "side": side, **measured(own[side], made[side])} for side in own]
        failed += [
            {"row": row, "side": side, "why": why.get(text, "not asked")}
            for side, text in own.items()
            if side not in made
        ]
    failures = out.with_name(f"{out.name}.failures.jsonl")
    for file, found in ((failures, failed), (out, rows), (out.with_name(f"{out.name}.hygiene.jsonl"), lines)):
        if found:
            replace(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found))
        else:
            file.unlink(missing_ok=True)
    if rows:
        means = {name: statistics.fmean(line[name] for line in lines) for name in _MEASURES}
        print(f"{len(rows)} of {len(pairs)} pairs are rewritten, in {out}: {_SAID.format(**means)}")
    if failed:
        said = "; ".join(f"row {item['row']}, {item['side']}: {item['why']}" for item in failed[:5])
        raise TrialFailed(
            f"{len(failed)} responses have no usable rewriting ({said}{'; …' if failed[5:] else ''}); all are in {failures}. "
            "Run the same command to ask again where a request failed, or with more --attempts or a higher --max-cost."
        )
