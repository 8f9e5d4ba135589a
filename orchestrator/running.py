"""Running what is missing of a sweep: the backend, the live table, and MLflow's one writer, wired together."""

import dataclasses
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.artifacts import replace
from orchestrator.cli import Session
from orchestrator.declaration import Declaration
from orchestrator.progress import Progress, quiet
from orchestrator.redaction import redacted, redacted_fields
from orchestrator.report import Written, write_report
from orchestrator.stages import TrialPlan
from orchestrator.workers import set_ray_environment
from trainers.specs import Placement


@dataclasses.dataclass(slots=True)
class Phases:
    """Wall seconds of a run, phase by phase, for benchmarks/demo_phases.py."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _since: float = dataclasses.field(default_factory=time.perf_counter)

    def end(self, phase: str) -> None:
        """Everything since the last end was `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


def run_missing(
    session: Session,
    declaration: Declaration,
    todo: Sequence[TrialPlan],
    placements: dict[str, Placement],
    phases: Phases,
) -> tuple[dict[str, str], Written]:
    """Run `todo`, then write the report; trial key → message for those that failed, and what was written."""
    from orchestrator.tracking import Tracker

    store = session.store
    with quiet(session.driver_log, session.console.width) as terminal:
        tracker = Tracker(session.tracking_uri, store, declaration)
        names = {item.key: item.spec.name for item in todo}
        with Progress(terminal, names, len(declaration.trials) - len(todo)) as progress:

            def on_event(event: dict[str, Any]) -> None:
                if "message" in event or "detail" in event:
                    event = redacted_fields(event)
                progress.on_event(event)
                if event["event"] == "started":
                    tracker.started(event["trial"])
                elif event["event"] in ("complete", "failed"):
                    tracker.ended(event["trial"], failed=event["event"] == "failed")
                if "detail" in event:
                    replace(session.driver_log.with_name(f"{event['trial']}.log"), event["detail"])

            failed = redacted_fields(_execute(session, todo, placements, on_event, phases))
        written = write_report(declaration, store)
        tracker.report(written.folder, complete=all(result.complete for result in written.results))
        trouble = tracker.close()
        phases.end("mlflow")
    if trouble:
        session.console.print(
            f"warning: the MLflow view is incomplete ({redacted(trouble)}); `sync` rebuilds it",
            style="yellow",
            markup=False,
        )
    return failed, written


def _execute(
    session: Session,
    todo: Sequence[TrialPlan],
    placements: dict[str, Placement],
    on_event: Callable[[dict[str, Any]], None],
    phases: Phases,
) -> dict[str, str]:
    if session.options.backend == "inline":
        from orchestrator.inline import run_inline

        failed = run_inline(todo, placements, session.store, on_event)
        phases.end("trials")
        return failed
    set_ray_environment()
    import ray

    from orchestrator.cluster import start_ray
    from orchestrator.fanout import run_on_ray

    (session.store.root / "scratch").mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{session.sweep_name}-", dir=session.store.root / "scratch"))
    try:
        start_ray(len(os.sched_getaffinity(0)))
        # Ray's own handler would end the process with the signal's number.
        signal.signal(signal.SIGTERM, _interrupt)
        phases.end("start ray")
        failed = run_on_ray(todo, placements, session.store, on_event, scratch)
        phases.end("trials")
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
    phases.end("stop ray")
    return failed


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
