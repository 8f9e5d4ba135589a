"""Analyses of what a sweep has trained and evaluated: computed after it, in the driver's process, without Ray.

Their keys hold those of the trainings or evaluations that they read, so a sweep that grows computes only what is new.
The report has a copy of each in report/analyses/<name>/; sweep.json names them, so that gc keeps them.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.declaration import Declaration
from orchestrator.trial_plan import TrialPlan, usable
from trainers.specs import clean_name

if TYPE_CHECKING:
    from orchestrator.analyses import AnalyseStage, Compute
    from orchestrator.cli import Session

KIND, SUMMARY = "analyse", "summary.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowUp:
    """Which analyses a sweep's trials come to, and what computes one."""

    declare: "Callable[[Sequence[TrialPlan]], Sequence[AnalyseStage]]"
    compute: "Compute"


def with_analyses(declaration: Declaration, session: "Session", plans: Sequence[TrialPlan]) -> Declaration:
    """The declaration with the artifacts of the sweep's analyses."""
    if session.follow_up is None:
        return declaration
    named = {f"{KIND}/{stage.key}" for stage in session.follow_up.declare(plans)}
    return dataclasses.replace(declaration, artifacts=tuple(sorted(named.union(declaration.artifacts or ()))))


def run_follow_up(session: "Session", declaration: Declaration, plans: Sequence[TrialPlan]) -> bool:
    """Compute the analyses that are missing and whose trainings and evaluations are there; whether there were any."""
    if session.follow_up is None:
        return False
    from orchestrator.analyses import compute_all

    store = session.store
    missing = [
        stage
        for stage in session.follow_up.declare(plans)
        if not store.complete(stage.kind, stage.key) and all(usable(read, store) for read in stage.reads)
    ]
    if missing:
        compute_all(session, missing, session.follow_up.compute)
    return bool(missing)


def show_analyses(session: "Session", declaration: Declaration) -> None:
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
