"""Preference pairs in other words as artifacts of a store: a token-level shift (paper §2).

`python -m trainers.data rewrite` does the same to a file, with an estimate and a budget. Here the rewritten
set is computed once for its pairs, model and prompt, and evaluated on by its path. A model is asked at
$OPENAI_BASE_URL with $OPENAI_API_KEY; every answer is journaled, and the same command goes on from there.

python sweeps/rewrite.py                                     the tiny world by rule, in seconds
python sweeps/rewrite.py --data FILE --model NAME --into paraphrase french --sample 200
python sweeps/full_grid.py --train-sets FILE --eval-sets french=<storage>/sweeps/rewrite/report/french
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from orchestrator.cli.analyses import Analyses, AnalysisOptions
from orchestrator.cli.main import main
from orchestrator.cli.options import Plan
from orchestrator.cli.session import Session
from orchestrator.report.analysis_files import write_analysis
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
    Outcome,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is rewritten, and who is asked how often."""

    split: str = "test"
    """The split to rewrite."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME|rules:NAME")] = f"{RULES}tiny_world"
    """Name of the model at the endpoint, or rules: rules:english, rules:tiny_world."""
    sample: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Rewrite this many pairs, drawn as in the paper, in the set's order."""
    sample_seed: int = SUBSET_SEED
    """Seed of that draw."""
    max_tokens: int = 512
    """Most tokens of an answer; an answer that reaches them is cut off."""
    attempts: int = 3
    """Most answers to ask for before a response is listed as failed."""

    @property
    def asking(self) -> Asking | None:
        """How the model is asked; None where it is rules."""
        if self.model.startswith(RULES):
            return None
        return Asking(model=self.model, max_tokens=self.max_tokens, attempts=self.attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """What a rewritten set depends on: the digest of its rows, and a model's task or the digest of the rules."""

    request: Request
    dataset: str
    into: str
    task: Task | None
    rules: str


@dataclass(frozen=True, kw_only=True)
class RewriteOptions(AnalysisOptions):
    """Rewrite the responses of a set by a model behind $OPENAI_BASE_URL, or by rule."""

    data: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "tiny_world"
    """A known name, a file, a folder or a hub id."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    request: tyro.conf.OmitArgPrefixes[Request] = Request()
    into: Annotated[tuple[str, ...], tyro.conf.arg(metavar="paraphrase|LANGUAGE")] = (PARAPHRASE,)
    """paraphrase, or languages: french, spanish, german, …; one set of each."""
    prompt: Path | None = None
    """File with your own prompt, with {response} where the text goes."""
    language: str | None = None
    """Language code that an answer must have, where --into does not say it."""


def declare(options: RewriteOptions, session: Session) -> Sequence[AnalyseStage]:
    """Return one stage per rewriting. Raises SpecError, DataError."""
    request, into = options.request, options.into
    if not into or len(set(into)) < len(into):
        raise SpecError("--into: give one or more, each once.")
    if request.sample is not None and request.sample < 1:
        raise SpecError(f"--sample {request.sample}: give at least 1.")
    tasks: list[Task | None] = [None]
    rules = ""
    if asking := request.asking:
        tasks = [task_for(name, options.prompt, options.language) for name in into]
        asking.require_valid()
    elif into == (PARAPHRASE,):
        rules = rules_digest(request.model.removeprefix(RULES))
    else:
        raise SpecError(f"--into {' '.join(into)}: rules paraphrase only; give a model as --model.")
    fetch = not isinstance(options.command, Plan)
    spec = chosen_spec(options.data, options.reading)
    reader = DatasetReader(session.store, fetch=fetch)
    rows = reader.split(spec, own_split(spec, request.split))
    session.say_left_out(reader.said_left_out())
    if fetch:
        sampled(read_written_pairs(session.store.read("dataset", rows.digest) / "pairs.jsonl"), None, 0)
    return [
        AnalyseStage(
            analysis=clean_name(name),
            version=VERSION,
            compute=compute,
            parameters=Rewriting(request=request, dataset=rows.digest, into=name, task=task, rules=rules),
        )
        for name, task in zip(into, tasks, strict=True)
    ]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write the rewritten pairs, what each is like, and what has no usable rewriting."""
    parameters: Rewriting = stage.parameters
    request, folder = parameters.request, attempt.directory
    file = f"{clean_name(request.split)}.jsonl"
    rows = read_written_pairs(inputs.store.read("dataset", parameters.dataset) / "pairs.jsonl")
    pairs = sampled(rows, request.sample, request.sample_seed)
    outcome = _rewritten(parameters, responses_of(pairs), inputs)
    written = write_rewritten(
        folder / file,
        pairs,
        outcome,
        hygiene=folder / "hygiene.jsonl",
        failures=folder / "failures.jsonl",
    )
    paragraphs = [f"{written}."]
    if written.kept:
        paragraphs.append(f"{file} is a data set: give it, or its folder, to --eval-sets or prepare.")
    if written.failures:
        paragraphs.append(
            f"{written.said_failures()}; all are in failures.jsonl, and their pairs are left out. The same command with "
            "more --attempts, or another --model, may rewrite them."
        )
    results = {
        "name": stage.label,
        "pairs": written.pairs,
        "rewritten": written.kept,
        "holes": len(written.failures),
        **written.means,
    }
    write_analysis(attempt, f"{parameters.into} by {request.model}", paragraphs, results=results)


def _rewritten(parameters: Rewriting, texts: Sequence[str], inputs: AnalysisInputs) -> Outcome:
    """Rewrite by rule, or by a model, whose every answer to this prompt is kept: more rows and attempts go on from it."""
    asking, task = parameters.request.asking, parameters.task
    if asking is None or task is None:
        return rewrite_by_rules(texts, parameters.request.model.removeprefix(RULES))
    key = content_key("rewriting", VERSION, model=asking.model, task=task, tokens=asking.max_tokens)
    file = inputs.store.local / "rewritings" / f"{key}.jsonl"
    with alone(file):
        journal = Journal(file)
        outcome = rewrite_texts(texts, task, asking, journal)
        inputs.say(f"paid: {journal.spent(asking)}")
    return outcome


if __name__ == "__main__":
    main(Analyses(options=RewriteOptions, declare=declare), __file__, __doc__)
