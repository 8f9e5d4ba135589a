"""`python -m trainers.data rewrite SET --into french --endpoint URL --model NAME --out FILE`: token-level shift, made.

    FILE                      parquet or jsonl: prompt, chosen, rejected, orig_chosen, orig_rejected, orig_index
    FILE.journal.jsonl        every answer that was paid; the same command goes on from it
    FILE.hygiene.jsonl        overlap, chrF, length ratio and language of every response
    FILE.failures.jsonl       responses without a usable answer, and why

Chosen and rejected responses are rewritten independently, prompts are not, as in the paper (§2).
"""

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from trainers.data import hygiene, rewritten
from trainers.data.choosing import Reading, chosen_spec
from trainers.data.endpoint import endpoint
from trainers.data.hygiene import LANGUAGES
from trainers.data.journal import Journal
from trainers.data.named import SUBSET_SEED
from trainers.data.records import Pair
from trainers.data.rewriting import (
    Answer,
    Outcome,
    Spending,
    Terms,
    estimate,
    require_affordable,
    rewrite_all,
    spent,
)
from trainers.data.rewritten import PARAPHRASE
from trainers.data.rules import rewritten_by_rules
from trainers.data.show_command import say_left_out
from trainers.data.sources import read_pairs
from trainers.errors import SpecError, TrialFailed


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Rewrite the responses of a set by a model behind an OpenAI-compatible endpoint, or by rule."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME|PATH")]]
    """A known name, a file, a folder or a hub id."""
    out: Path
    """File to write, .parquet or .jsonl."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    split: str = "test"
    """Which split."""
    into: str = PARAPHRASE
    """paraphrase, or a language: french, spanish, german, …"""
    endpoint: str | None = None
    """Base address, for example http://127.0.0.1:8000/v1; its key is $OPENAI_API_KEY."""
    model: str | None = None
    """The model's name there."""
    rules: str | None = None
    """In the place of a model: english or tiny_world, exchanged words and turns of phrase."""
    prompt: Path | None = None
    """File with a prompt of one's own, {response} where the text goes."""
    language: str | None = None
    """Code that the language check expects, where --into is none that is known."""
    sample: int | None = None
    """Rewrite N pairs, drawn as in the paper and in the set's order."""
    sample_seed: int = SUBSET_SEED
    """Of that draw."""
    max_tokens: int = 512
    """Of an answer; one that reaches them is cut off."""
    attempts: int = 3
    """Answers that are asked for before a response is listed as failed."""
    tries: int = 6
    """How often a request is sent that meets faults that may pass."""
    concurrency: int = 8
    """Requests at once."""
    requests_per_minute: float | None = None
    """Pace."""
    timeout_s: float = 120.0
    """Of a request."""
    pause_s: float = 1.0
    """Before a request is sent again, doubled each time; a Retry-After goes before it."""
    input_price: float = 0.0
    """Of a million tokens."""
    output_price: float = 0.0
    """Of a million tokens."""
    max_cost: float | None = None
    """Start nothing that is estimated over it, and ask no more before it could be passed."""
    max_tokens_total: int | None = None
    """The same in tokens of both kinds, those of earlier runs counted."""
    estimate: bool = False
    """Say what it would take, and ask nothing."""


def run_rewrite(arguments: Rewrite) -> None:
    """Rewrite, or go on. Raises SweepError; TrialFailed where responses are left without a usable answer."""
    if (arguments.rules is None) == (arguments.endpoint is None):
        raise SpecError("give --endpoint URL with --model NAME, or --rules NAME.")
    if arguments.out.suffix not in (".parquet", ".jsonl"):
        raise SpecError(f"--out {arguments.out}: name a .parquet or .jsonl file.")
    spec = chosen_spec(arguments.data, arguments.reading)
    called = {"train": spec.train_split, "test": spec.test_split}
    left_out: list[str] = []
    rows = read_pairs(spec, called.get(arguments.split, arguments.split), left_out)
    say_left_out(left_out)
    rewritten.require_texts(rows)
    pairs = rewritten.sampled(rows, arguments.sample, arguments.sample_seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.rules is not None:
        rules = arguments.rules
        _write(arguments, pairs, lambda text: rewritten_by_rules(text, rules))
        print(f"{len(pairs)} pairs rewritten by the rules {rules}, in {arguments.out}")
        return
    texts = rewritten.responses_of(pairs)
    terms = _terms(arguments)
    with Journal(_beside(arguments.out, "journal")) as journal:
        missing = [t for t in dict.fromkeys(texts) if journal.accepted(terms.key(t)) is None]
        wanted, already = estimate(missing, terms), spent(journal, terms)
        print(f"{len(missing)} responses to rewrite, about {_said(wanted)}; paid before: {_said(already)}")
        require_affordable(wanted, already, terms)
        if arguments.estimate:
            return
        outcome = (
            asyncio.run(_ask(arguments, texts, terms, journal))
            if missing
            else Outcome(gave_up={}, stopped=None)
        )
        answers = {text: answer.text for text in texts if (answer := journal.accepted(terms.key(text)))}
        print(f"paid: {_said(spent(journal, terms))}")
    _finish(arguments, pairs, terms, answers, outcome)


def _terms(arguments: Rewrite) -> Terms:
    if arguments.model is None:
        raise SpecError("--endpoint needs --model NAME.")
    names = {item.name for item in dataclasses.fields(Terms)} - {"prompt"}
    prompt = rewritten.prompt_for(arguments.into, arguments.prompt, "--into")
    return Terms(prompt=prompt, **{name: getattr(arguments, name) for name in names})


async def _ask(arguments: Rewrite, texts: list[str], terms: Terms, journal: Journal) -> Outcome:
    wanted = arguments.language or LANGUAGES.get(arguments.into)
    hygiene.load()

    def check(text: str, answer: Answer) -> str | None:
        return hygiene.fault(text, answer.text, wanted=wanted, cut=answer.cut)

    async with endpoint(str(arguments.endpoint), terms, arguments.timeout_s) as ask:
        return await rewrite_all(texts, terms, journal, ask, check)


def _finish(
    arguments: Rewrite, pairs: list[tuple[int, Pair]], terms: Terms, answers: dict[str, str], outcome: Outcome
) -> None:
    """Write what is whole, list what is not."""
    kept = rewritten.whole(pairs, answers)
    failed = rewritten.failures(
        pairs, answers, lambda text: outcome.gave_up.get(terms.key(text), "not asked")
    )
    listed = _beside(arguments.out, "failures")
    listed.unlink(missing_ok=True)
    if kept:
        _write(arguments, kept, answers.__getitem__)
        print(f"{len(kept)} of {len(pairs)} pairs rewritten, in {arguments.out}")
    if not failed:
        return
    rewritten.write_lines(listed, failed)
    stopped = (
        f"stopped: {outcome.stopped}; the same command with a higher cap goes on. " if outcome.stopped else ""
    )
    raise TrialFailed(
        f"{stopped}{len(failed)} responses have no usable rewriting ({rewritten.said_failures(failed)}); all are "
        f"in {listed}. Run the same command to try those again that met passing faults, or with more --attempts."
    )


def _write(arguments: Rewrite, pairs: list[tuple[int, Pair]], exchanged: Callable[[str], str]) -> None:
    means = rewritten.write_rewritten(arguments.out, _beside(arguments.out, "hygiene"), pairs, exchanged)
    print(rewritten.said_means(means))


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}.jsonl")


def _said(spending: Spending) -> str:
    return f"{spending.prompt_tokens:,} + {spending.completion_tokens:,} tokens, cost {spending.cost:.2f}"
