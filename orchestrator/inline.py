"""The same stages in one process, in plan order, with no Ray: for debugging and tests."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.artifacts import Store
from orchestrator.compute import run_evaluations, run_shared, run_train
from orchestrator.failures import message
from orchestrator.stages import EvaluateStage, TrainStage, TrialPlan
from trainers.specs import Placement

Event = Callable[[dict[str, Any]], None]


def run_inline(
    plans: Sequence[TrialPlan], placements: Mapping[str, Placement], store: Store, post: Event
) -> dict[str, str]:
    """Run what is missing of each plan; trial key → message for those that failed."""
    failed: dict[str, str] = {}
    for plan in plans:
        post({"trial": plan.key, "event": "started"})
        try:
            _run_trial(plan, placements[plan.key], store, post)
        except Exception as error:
            failed[plan.key] = message(error)
            detail = traceback.format_exc()
            post({"trial": plan.key, "event": "failed", "message": message(error), "detail": detail})
        else:
            post({"trial": plan.key, "event": "complete"})
    return failed


def _run_trial(plan: TrialPlan, placement: Placement, store: Store, post: Event) -> None:
    evaluations: list[EvaluateStage] = []
    for stage in plan.missing(store):
        if isinstance(stage, EvaluateStage):
            evaluations.append(stage)
            continue

        def report(row: dict[str, Any], kind: str = stage.kind) -> None:
            post({"trial": plan.key, "event": "row", "stage": kind, "row": row})

        post({"trial": plan.key, "event": "stage", "stage": stage.kind})
        if isinstance(stage, TrainStage):
            alone = Placement(
                zero_stage=placement.zero_stage,
                micro_batch=placement.micro_batch,
                accumulation=placement.accumulation * placement.world_size,
                device=placement.device,
            )
            run_train(stage, alone, store, report, {"backend": "inline"})
        else:
            run_shared(stage, store, report)
    post({"trial": plan.key, "event": "stage", "stage": "evaluate"})
    run_evaluations(
        evaluations,
        store,
        lambda row: post({"trial": plan.key, "event": "row", "stage": "evaluate", "row": row}),
    )
