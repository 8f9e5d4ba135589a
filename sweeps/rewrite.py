"""Preference pairs in other words as artifacts of a store: a token-level shift (paper §2).

`python -m trainers.data rewrite` does the same to a file, with an estimate and a budget. Here the rewritten
set is computed once for its pairs, model and prompt, and evaluated on by its path. A model is asked at
$OPENAI_BASE_URL with $OPENAI_API_KEY; every answer is journaled, and the same command goes on from there.

python sweeps/rewrite.py                                     the tiny world by rule, in seconds
python sweeps/rewrite.py --data FILE --model NAME --into paraphrase french --sample 200
python sweeps/full_grid.py --train-sets FILE --eval-sets french=<storage>/sweeps/rewrite/report/french
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from orchestrator.cli.analyses import AnalysisOptions, main
from orchestrator.cli.follow_up import SUMMARY
from orchestrator.cli.options import Plan
from orchestrator.cli.session import Session, say_left_out
from orchestrator.spec.datasets import DatasetReader
from orchestrator.spec.keys import content_key
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.data.known import SUBSET_SEED
from trainers.data.records import read_written_pairs
from trainers.data.rewriting import (
    PARAPHRASE,
    Asking,
    Journal,
    Task,
    responses_of,
    rewrite_by_rules,
    rewrite_texts,
    sampled,
    task_for,
    write_rewritten,
)
from trainers.data.sources import Reading, chosen_spec, own_split
from trainers.data.worlds import rules_digest
from trainers.errors import SpecError
from trainers.specs import clean_name
from trainers.storage import alone

# Raise when the same model and words give other rewritings, or other answers are taken.
VERSION = 2
RULES = "rules:"


@dataclass(frozen=True, kw_only=True)
class RewriteOptions(AnalysisOptions):
    """Rewrite the responses of a set by a model behind $OPENAI_BASE_URL, or by rule."""

    data: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "tiny_world"
    """A known name, a file, a folder or a hub id."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    split: str = "test"
    """The split to rewrite."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME|rules:NAME")] = f"{RULES}tiny_world"
    """Name of the model at the endpoint, or rules: rules:english, rules:tiny_world."""
    into: Annotated[tuple[str, ...], tyro.conf.arg(metavar="paraphrase|LANGUAGE")] = (PARAPHRASE,)
    """paraphrase, or languages: french, spanish, german, …; one set of each."""
    prompt: Path | None = None
    """File with your own prompt, with {response} where the text goes."""
    language: str | None = None
    """Language code that an answer must have, where --into does not say it."""
    sample: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Rewrite this many pairs, drawn as in the paper, in the set's order."""
    sample_seed: int = SUBSET_SEED
    """Seed of that draw."""
    max_tokens: int = 512
    """Most tokens of an answer; an answer that reaches them is cut off."""
    attempts: int = 3
    """Most answers to ask for before a response is listed as failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewritingParameters:
    """What a rewritten set depends on; `rules` is the digest of the rules where the model is none."""

    dataset: str
    split: str
    sample: int | None
    sample_seed: int
    into: str
    model: str
    rules: str = ""
    task: Task | None = None
    max_tokens: int = 0
    attempts: int = 0


def declare(options: RewriteOptions, session: Session) -> Sequence[AnalyseStage]:
    """Return one stage per rewriting. Raises SpecError, DataError."""
    if not options.into or len(set(options.into)) < len(options.into):
        raise SpecError("--into: give one or more, each once.")
    if options.sample is not None and options.sample < 1:
        raise SpecError(f"--sample {options.sample}: give at least 1.")
    fetch = not isinstance(options.command, Plan)
    if not options.model.startswith(RULES):
        ways: list[dict[str, Any]] = [
            {
                "task": task_for(into, options.prompt, options.language),
                "max_tokens": options.max_tokens,
                "attempts": options.attempts,
            }
            for into in options.into
        ]
        Asking(model=options.model, max_tokens=options.max_tokens, attempts=options.attempts).require_valid()
    elif options.into == (PARAPHRASE,):
        ways = [{"rules": rules_digest(options.model.removeprefix(RULES))}]
    else:
        raise SpecError(f"--into {' '.join(options.into)}: rules paraphrase only; give a model as --model.")
    spec = chosen_spec(options.data, options.reading)
    reader = DatasetReader(session.store, fetch=fetch)
    rows = reader.split(spec, own_split(spec, options.split))
    say_left_out(session, reader.said_left_out())
    if fetch:
        sampled(read_written_pairs(session.store.read("dataset", rows.digest) / "pairs.jsonl"), None, 0)
    return [
        AnalyseStage(
            analysis=clean_name(into),
            version=VERSION,
            parameters=RewritingParameters(
                dataset=rows.digest,
                split=clean_name(options.split),
                sample=options.sample,
                sample_seed=options.sample_seed,
                into=into,
                model=options.model,
                **way,
            ),
        )
        for into, way in zip(options.into, ways, strict=True)
    ]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write the rewritten pairs, what each is like, and what has no usable rewriting."""
    parameters: RewritingParameters = stage.parameters
    folder = attempt.directory
    rows = read_written_pairs(inputs.store.read("dataset", parameters.dataset) / "pairs.jsonl")
    pairs = sampled(rows, parameters.sample, parameters.sample_seed)
    texts = responses_of(pairs)
    if parameters.task is None:
        outcome = rewrite_by_rules(texts, parameters.model.removeprefix(RULES))
    else:
        asking = Asking(
            model=parameters.model, max_tokens=parameters.max_tokens, attempts=parameters.attempts
        )
        # Every answer of this model to this prompt: other rows and more attempts go on from it.
        key = content_key(
            "rewriting", VERSION, model=asking.model, task=parameters.task, tokens=asking.max_tokens
        )
        file = inputs.store.local / "rewritings" / f"{key}.jsonl"
        with alone(file):
            journal = Journal(file)
            outcome = rewrite_texts(texts, parameters.task, asking, journal)
            inputs.say(f"paid: {journal.spent(asking)}")
    written = write_rewritten(
        folder / f"{parameters.split}.jsonl",
        pairs,
        outcome,
        hygiene=folder / "hygiene.jsonl",
        failures=folder / "failures.jsonl",
    )
    results = {
        "name": stage.label,
        "pairs": written.pairs,
        "rewritten": written.kept,
        "holes": len(written.failures),
        **written.means,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    lines = [f"# {parameters.into} by {parameters.model}", f"{written}."]
    if written.kept:
        lines.append(
            f"{parameters.split}.jsonl is a data set: give it, or its folder, to --eval-sets or prepare."
        )
    if written.failures:
        lines.append(
            f"{written.said_failures()}; all are in failures.jsonl, and their pairs are left out. The same command with "
            "more --attempts, or another --model, may rewrite them."
        )
    (folder / SUMMARY).write_text("\n\n".join(lines) + "\n")
    attempt.info.update(results=results)


if __name__ == "__main__":
    main(RewriteOptions, "rewrite", declare, compute, Path(__file__).parent)
