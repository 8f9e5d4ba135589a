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
from orchestrator.report.rewritten_sets import RULES, VERSION, RewritingRequest, RewrittenSet, write_set
from orchestrator.spec.datasets import DatasetReader
from orchestrator.spec.stages import AnalyseStage
from trainers.data.records import read_written_pairs
from trainers.data.rewriting import PARAPHRASE, Task, sampled, task_for
from trainers.data.sources import Reading, chosen_spec, own_split
from trainers.data.worlds import rules_digest
from trainers.errors import SpecError
from trainers.specs import clean_name


@dataclass(frozen=True, kw_only=True)
class RewriteOptions(AnalysisOptions):
    """Rewrite the responses of a set by a model behind $OPENAI_BASE_URL, or by rule."""

    data: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "tiny_world"
    """A known name, a file, a folder or a hub id."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    request: tyro.conf.OmitArgPrefixes[RewritingRequest] = field(default_factory=RewritingRequest)
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
            compute=write_set,
            parameters=RewrittenSet(request=request, dataset=rows.digest, into=name, task=task, rules=rules),
        )
        for name, task in zip(into, tasks, strict=True)
    ]


EXPERIMENT = Analyses(options=RewriteOptions, declare=declare)
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
