"""Analyses of what a sweep has trained and evaluated: computed after it, in the driver's process, without Ray.

What an analysis needs trained besides the sweep's own trials are trials like these, run with them. Their keys hold those of the trainings or evaluations that they read, so a sweep that grows computes only what is new.
The report has a copy of each in report/analyses/<name>/; sweep.json names them, so that gc keeps them.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence

from orchestrator.analyse import compute_analyses
from orchestrator.analyse_stage import AnalyseStage, Compute
from orchestrator.artifacts import Store
from orchestrator.declaration import Declaration, read_declaration, with_further
from orchestrator.progress import quiet
from orchestrator.resolve import ResolvedSweep
from orchestrator.results import TrialResult, trial_result
from orchestrator.session import Session
from orchestrator.stages import Stage
from orchestrator.trial_plan import TrialPlan, usable
from trainers.specs import clean_name

KIND, SUMMARY = "analyse", "summary.md"


def compute_missing(session: Session, stages: Sequence[AnalyseStage], compute: Compute) -> None:
    """Compute analyses, while what libraries say goes to the driver's log."""
    with quiet(session.driver_log, session.console.width) as terminal:

        def say(text: str) -> None:
            terminal.print(text, markup=False, highlight=False, soft_wrap=True)

        compute_analyses(stages, compute, session.store, session.sweep_name, say)


def further_trials(session: Session, plans: Sequence[TrialPlan]) -> tuple[TrialPlan, ...]:
    """What the analyses read besides the sweep's own trials, each once, as far as it is known by now."""
    follow_up = session.follow_up
    if follow_up is None:
        return ()
    found = {
        trial.key: trial
        for stage in follow_up.declare(plans)
        for trial in follow_up.further(stage, plans, session.store).trials
    }
    own = {plan.key for plan in plans}
    return tuple(trial for key, trial in found.items() if key not in own)


def with_analyses(
    declaration: Declaration, session: Session, resolved: ResolvedSweep, further: Sequence[TrialPlan]
) -> Declaration:
    """The declaration with the artifacts of the sweep's analyses, and the further trials that they read."""
    if session.follow_up is None:
        return declaration
    wider = with_further(declaration, further, resolved)
    named = {f"{KIND}/{stage.key}" for stage in session.follow_up.declare(resolved.plans)}
    return dataclasses.replace(wider, artifacts=tuple(sorted(named.union(wider.artifacts or ()))))


def further_results(session: Session, *, holes: bool = False) -> list[TrialResult]:
    """What is there of the further trials that the last command declared; of `holes` only, where asked for these."""
    if session.follow_up is None:
        return []
    store, declaration = session.store, read_declaration(session.sweep_name, session.store)
    return [
        trial_result(record, store) for record in declaration.further if not (holes and record.whole(store))
    ]


def run_follow_up(session: Session, declaration: Declaration, plans: Sequence[TrialPlan]) -> bool:
    """Compute what is missing of the declared analyses, where their trainings and evaluations are there; whether any was."""
    follow_up, store = session.follow_up, session.store
    if follow_up is None:
        return False

    def ready(stage: AnalyseStage) -> bool:
        further = follow_up.further(stage, plans, store)
        trained = further.whole and all(trial.complete(store) for trial in further.trials)
        there = usable if follow_up.loads_weights else _complete
        return trained and all(there(read, store) for read in stage.reads)

    missing = [
        stage
        for stage in follow_up.declare(plans)
        if f"{KIND}/{stage.key}" in (declaration.artifacts or ())
        and not store.complete(stage.kind, stage.key)
        and ready(stage)
    ]
    if missing:
        compute_missing(session, missing, follow_up.compute)
    return bool(missing)


def _complete(stage: Stage, store: Store) -> bool:
    return store.complete(stage.kind, stage.key)


def show_analyses(session: Session, declaration: Declaration) -> None:
    """Copy what is there into the report, and print the summaries."""
    store = session.store
    folder = store.local_sweep_dir(declaration.sweep) / "report" / "analyses"
    shutil.rmtree(folder, ignore_errors=True)
    keys = [
        key for kind, _, key in (item.partition("/") for item in declaration.artifacts or ()) if kind == KIND
    ]
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
