"""Trials in one process, in plan order, with no Ray: for debugging and tests; and analyses, which always run so."""

import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.run import compute, failures
from orchestrator.run.compute import TrainCall
from orchestrator.run.events import Completed, Event, Failed, Post, Started, posting_for, reporting
from orchestrator.run.trial import Execution, complete_trial, compute_leased
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, EvaluateStage, Stage, TrainStage, TrialPlan
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import heartbeat
from trainers.specs import Placement
from trainers.train.stopping import StopRequest

Say = Callable[[str], None]


def run_inline(
    plans: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    on_event: Post,
    execution: Execution,
    stop: StopRequest,
) -> None:
    """Run what is missing of each plan. Raises KeyboardInterrupt when stopped; what fails is an event."""
    for plan in plans:
        post = posting_for(plan.key, on_event)
        post(Started())
        try:
            complete_trial(plan, placements[plan.key], InlineBackend(execution, post, stop), execution)
        except Exception as error:
            if failures.interrupted(error):
                raise KeyboardInterrupt from error
            failure = failures.classify(error)
            detail = traceback.format_exc()
            post(Failed(cause=failure.cause, message=failure.message, detail=detail))
        else:
            post(Completed())


@dataclass(frozen=True, slots=True)
class InlineBackend:
    """Computes in this process."""

    execution: Execution
    post: Post
    stop: StopRequest

    def shared(self, stages: Sequence[Stage]) -> None:
        """Compute each, after what it needs."""
        for stage in stages:
            store = self.execution.store
            if store.complete(stage.kind, stage.key):
                continue
            self.shared(stage.needs)
            assert not isinstance(stage, TrainStage | EvaluateStage)
            name = f"{stage.kind}-{stage.key}"
            done = functools.partial(store.complete, stage.kind, stage.key)
            with (
                reporting(stage.kind, self.post) as report,
                self.execution.leases.held(name, done, self.pause) as ours,
            ):
                if ours:
                    compute_leased(stage, store, report)

    def train(self, stage: TrainStage, placement: Placement) -> None:
        """Train as a world of one."""
        call = TrainCall(
            placement=dataclasses.replace(placement, world_size=1),
            checkpoint_steps=self.execution.checkpoint_steps,
            stop=self.stop.left_s,
            provenance={"backend": "inline"},
        )
        with reporting(stage.kind, self.post) as report, self.stop.deferred():
            compute.run_train(stage, call, self.execution.store, report)

    def evaluate(self, plan: TrialPlan, stages: Sequence[EvaluateStage], placement: Placement) -> None:
        """Score in this process."""
        with reporting("evaluate", self.post) as report:
            compute.run_evaluations(stages, self.execution.store, report)

    def gpus(self) -> int:
        """One at most: a training is a world of one."""
        return 1

    def pause(self, seconds: float) -> None:
        """Sleep; a signal ends it."""
        time.sleep(seconds)


def compute_analyses(stages: Sequence[AnalyseStage], store: Store, say: Say) -> None:
    """Compute the stages that are missing, and what they need. What an analysis says while it computes goes to `say`."""
    stop = StopRequest(0.0)
    with stop.listening(), heartbeat(store.root) as leases:
        execution = Execution(store=store, leases=leases)
        backend = InlineBackend(execution, _nobody_waits, stop)
        for stage in stages:
            try:
                _compute_missing(stage, backend, say)
            except Exception as error:
                failures.set_aside_damage(error, store)
                raise


def _nobody_waits(event: Event) -> None:
    """No trial waits for what an analysis needs."""


def _compute_missing(stage: AnalyseStage, backend: InlineBackend, say: Say) -> None:
    store, leases = backend.execution.store, backend.execution.leases
    backend.shared(stage.needs)
    name = f"{stage.kind}-{stage.key}"
    with leases.held(name, lambda: store.complete(stage.kind, stage.key), backend.pause) as ours:
        if ours:
            store.remove_leftovers(stage.kind, stage.key)
            parameters = dataclasses.asdict(stage.parameters)
            with store.write(stage.kind, stage.key, parameters=parameters) as attempt:
                stage.compute(stage, _analysis_inputs(stage, store, say), attempt)


def _analysis_inputs(stage: AnalyseStage, store: Store, say: Say) -> AnalysisInputs:
    from trainers.pairs.tokens import read_tokens

    return AnalysisInputs(
        name=stage.label,
        location="" if stage.base is None else stage.base.found_at(store),
        base=stage.base,
        pairs={
            name: list(read_tokens(store.read(needed.kind, needed.key) / "pairs.arrow"))
            for name, needed in stage.prepared
        },
        store=store,
        say=say,
    )
