"""Computes analyses: one after the other in this process, each under a lease, from the store and into it."""

import dataclasses
from collections.abc import Callable, Sequence

from orchestrator.run.events import Event
from orchestrator.run.inline import InlineBackend
from orchestrator.run.trial import Execution
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import heartbeat
from trainers.train.stopping import StopRequest

Say = Callable[[str], None]


def compute_analyses(stages: Sequence[AnalyseStage], store: Store, say: Say) -> None:
    """Compute the stages that are missing, and what they need. What an analysis says while it computes goes to `say`."""
    stop = StopRequest(0.0)
    with stop.listening(), heartbeat(store.root) as leases:
        execution = Execution(store=store, leases=leases)
        backend = InlineBackend(execution, _ignore, stop)
        for stage in stages:
            _compute_missing(stage, backend, say)


def _ignore(event: Event) -> None:
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
                stage.compute(stage, _inputs(stage, store, say), attempt)


def _inputs(stage: AnalyseStage, store: Store, say: Say) -> AnalysisInputs:
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
