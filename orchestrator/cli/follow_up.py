"""Analyses of what a sweep has trained and evaluated: computed after it, in the driver's process, without Ray.

Their keys hold those of the trainings or evaluations that they read, so a sweep that grows computes only what is new.
The report has a copy of each in report/analyses/<name>/; sweep.json names them, so that gc keeps them.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence

from orchestrator.cli.session import Session
from orchestrator.cli.terminal import quiet
from orchestrator.run.analyses import compute_analyses
from orchestrator.run.failures import is_final
from orchestrator.spec.stages import AnalyseStage, Compute, EvaluateStage, TrainStage, TrialPlan, usable
from orchestrator.store.records import Declaration, read_state
from trainers.specs import clean_name

KIND, SUMMARY = "analyse", "summary.md"


def compute_missing(session: Session, stages: Sequence[AnalyseStage], compute: Compute) -> None:
    """Compute analyses, while what libraries say goes to the driver's log."""
    with quiet(session.driver_log, session.console.width) as terminal:

        def say(text: str) -> None:
            terminal.print(text, markup=False, highlight=False, soft_wrap=True)

        compute_analyses(stages, compute, session.store, session.sweep_name, say)


def with_analyses(declaration: Declaration, session: Session, plans: Sequence[TrialPlan]) -> Declaration:
    """The declaration with the artifacts of the sweep's analyses."""
    if session.follow_up is None:
        return declaration
    named = {f"{KIND}/{stage.key}" for stage in session.follow_up.declare(plans)}
    return dataclasses.replace(declaration, artifacts=tuple(sorted(named.union(declaration.artifacts))))


def run_follow_up(session: Session, declaration: Declaration, plans: Sequence[TrialPlan]) -> bool:
    """Compute what is missing of the declared analyses, where what they read is there; return whether any was.

    An analysis goes on without a training that failed for good.
    """
    follow_up, store = session.follow_up, session.store
    if follow_up is None:
        return False
    notes = read_state(session.sweep_name, store).trials
    given_up = {key for key, note in notes.items() if is_final(note.cause)}

    def there(read: TrainStage | EvaluateStage) -> bool:
        training = read if isinstance(read, TrainStage) else read.train
        complete = usable(read, store) if follow_up.loads_weights else store.complete(read.kind, read.key)
        return complete or training.key in given_up

    missing = [
        stage
        for stage in follow_up.declare(plans)
        if f"{KIND}/{stage.key}" in declaration.artifacts
        and not store.complete(stage.kind, stage.key)
        and all(map(there, stage.reads))
    ]
    if missing:
        compute_missing(session, missing, follow_up.compute)
    return bool(missing)


def show_analyses(session: Session, declaration: Declaration) -> None:
    """Copy what is there into the report, and print the summaries."""
    store = session.store
    folder = store.local_sweep_dir(declaration.sweep) / "report" / "analyses"
    shutil.rmtree(folder, ignore_errors=True)
    keys = [key for kind, _, key in (item.partition("/") for item in declaration.artifacts) if kind == KIND]
    found = {key: store.read(KIND, key) for key in keys if store.complete(KIND, key)}
    named = {json.loads((place / "results.json").read_text())["name"]: key for key, place in found.items()}
    for name, key in sorted(named.items()):
        shutil.copytree(found[key], folder / clean_name(name))
        if not session.options.json:
            session.console.print(
                (found[key] / SUMMARY).read_text(), markup=False, highlight=False, soft_wrap=True
            )
            session.console.print(f"artifact: {KIND}/{key}", highlight=False, soft_wrap=True)
    if named:
        store.share(folder)
