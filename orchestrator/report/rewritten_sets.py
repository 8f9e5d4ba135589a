"""A rewritten data set as an artifact: the request and the files. `sweeps/rewrite.py` is the command."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from orchestrator.report.analysis_files import write_analysis
from orchestrator.spec.keys import content_key
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.data import rewriting
from trainers.data.known import SUBSET_SEED
from trainers.data.records import read_written_pairs
from trainers.specs import clean_name
from trainers.storage import alone

# Raise when the same model and words give other rewritings, or other answers are taken.
VERSION = 2
RULES = "rules:"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewritingRequest:
    """The pairs to rewrite, the model that rewrites them, and its limits."""

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
    def asking(self) -> rewriting.Asking | None:
        """Return how the model is asked; None for rules."""
        if self.model.startswith(RULES):
            return None
        return rewriting.Asking(model=self.model, max_tokens=self.max_tokens, attempts=self.attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenSet:
    """Everything a rewritten set depends on: the digest of its rows, and a model's task or the digest of the rules."""

    request: RewritingRequest
    dataset: str
    into: str
    task: rewriting.Task | None
    rules: str


def write_set(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write the rewritten pairs, their properties, and the responses without a usable rewriting."""
    parameters: RewrittenSet = stage.parameters
    request, folder = parameters.request, attempt.directory
    file = f"{clean_name(request.split)}.jsonl"
    rows = read_written_pairs(inputs.store.read("dataset", parameters.dataset) / "pairs.jsonl")
    pairs = rewriting.sampled(rows, request.sample, request.sample_seed)
    outcome = _rewritten(parameters, rewriting.responses_of(pairs), inputs)
    written = rewriting.write_rewritten(
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


def _rewritten(parameters: RewrittenSet, texts: Sequence[str], inputs: AnalysisInputs) -> rewriting.Outcome:
    """Rewrite by rules or by a model, whose answers are all kept, so that a later request for more reuses them."""
    asking, task = parameters.request.asking, parameters.task
    if asking is None or task is None:
        return rewriting.rewrite_by_rules(texts, parameters.request.model.removeprefix(RULES))
    key = content_key("rewriting", VERSION, model=asking.model, task=task, tokens=asking.max_tokens)
    file = inputs.store.local / "rewritings" / f"{key}.jsonl"
    with alone(file):
        journal = rewriting.Journal(file)
        outcome = rewriting.rewrite_texts(texts, task, asking, journal)
        inputs.say(f"paid: {journal.spent(asking)}")
    return outcome
