"""Run trials one after the other in this process, without Ray, for debugging and tests; analyses always run this way."""

import dataclasses
import functools
import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from orchestrator.run import compute, failures
from orchestrator.run.compute import TrainCall
from orchestrator.run.events import Post, posting_for, reporting
from orchestrator.run.trial import Execution, run_to_end
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, EvaluateStage, Stage, TrainStage, TrialPlan
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import heartbeat
from trainers.errors import Interrupted
from trainers.specs import Placement
from trainers.train.stopping import StopRequest


def run_inline(
    plans: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    on_event: Post,
    execution: Execution,
    stop: StopRequest,
) -> None:
    """Run the missing stages of each plan. Failures are events. Raises KeyboardInterrupt when stopped."""
    for plan in plans:
        backend = InlineBackend(execution, posting_for(plan.key, on_event), stop)
        try:
            run_to_end(plan, placements[plan.key], backend, execution)
        except Interrupted as error:
            raise KeyboardInterrupt from error


@dataclass(frozen=True, slots=True)
class InlineBackend:
    """Computes the stages of one trial in this process."""

    execution: Execution
    post: Post
    stop: StopRequest

    def shared(self, stages: Sequence[Stage]) -> None:
        """Compute each missing stage after its needs."""
        for stage in stages:
            if self.execution.store.complete(stage.kind, stage.key):
                continue
            self.shared(stage.needs)
            assert not isinstance(stage, TrainStage | EvaluateStage)
            with reporting(stage.kind, self.post, stage.key) as report, self.leased(stage) as ours:
                if ours:
                    compute.run_shared(stage, self.execution.store, report)

    def leased(self, stage: Stage | AnalyseStage) -> AbstractContextManager[bool]:
        """Wait for the stage's lease; yields False if another driver completed the stage."""
        done = functools.partial(self.execution.store.complete, stage.kind, stage.key)
        return self.execution.leases.held(f"{stage.kind}-{stage.key}", done, self.pause)

    def train(self, stage: TrainStage, placement: Placement) -> None:
        """Train as a world of one."""
        _free_memory(placement)
        call = TrainCall(
            placement=dataclasses.replace(placement, world_size=1),
            checkpoint_steps=self.execution.checkpoint_steps,
            stop=self.stop.left_s,
            provenance={"backend": "inline"},
        )
        with reporting(stage.kind, self.post, stage.key) as report, self.stop.deferred():
            compute.run_train(stage, call, self.execution.store, report)

    def evaluate(self, plan: TrialPlan, stages: Sequence[EvaluateStage], placement: Placement) -> None:
        _free_memory(placement)
        with reporting("evaluate", self.post, stages[0].key) as report:
            compute.run_evaluations(stages, self.execution.store, report)

    def gpus(self) -> int:
        """Return 1: a training is a world of one."""
        return 1

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)


def _free_memory(placement: Placement) -> None:
    """Free the GPU's memory of a finished training: its engine and model refer to each other."""
    if placement.device == "cuda":
        gc.collect()


def compute_analyses(stages: Sequence[AnalyseStage], store: Store) -> None:
    """Compute the missing stages and their needs."""
    stop = StopRequest(0.0)
    with stop.listening(), heartbeat(store.root) as leases:
        # There is no trial to post events about.
        backend = InlineBackend(Execution(store=store, leases=leases), lambda event: None, stop)
        for stage in stages:
            try:
                _compute_missing(stage, backend)
            except Exception as error:
                failures.set_aside_damage(error, store)
                raise


def _compute_missing(stage: AnalyseStage, backend: InlineBackend) -> None:
    from trainers.pairs.tokens import TokenFile

    store = backend.execution.store
    backend.shared(stage.needs)
    with backend.leased(stage) as ours:
        if not ours:
            return
        store.remove_leftovers(stage.kind, stage.key)
        parameters = dataclasses.asdict(stage.parameters)
        without = [
            f"{read.kind}/{read.key}" for read in stage.reads if not store.complete(read.kind, read.key)
        ]
        with store.write(stage.kind, stage.key, parameters=parameters) as attempt:
            attempt.info["without"] = without
            inputs = AnalysisInputs(
                name=stage.label,
                location="" if stage.base is None else stage.base.found_at(store),
                base=stage.base,
                pairs={
                    name: list(TokenFile(store.read(needed.kind, needed.key) / "pairs.arrow"))
                    for name, needed in stage.prepared
                },
                store=store,
            )
            stage.compute(stage, inputs, attempt)
