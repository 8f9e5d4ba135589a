"""One analysis as a stage: what is in its key, what it is computed from, and computing it in this process, without Ray."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from orchestrator.artifacts import Attempt, Store
from orchestrator.claims import Claims, Heartbeat
from orchestrator.cli import Session
from orchestrator.events import Event
from orchestrator.inline import InlineBackend
from orchestrator.progress import quiet
from orchestrator.spec import content_key
from orchestrator.stages import BaseModel, EvaluateStage, Keyed, PrepareStage, Stage, TrainStage
from orchestrator.trial import Execution
from trainers.stopping import StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyseStage(Keyed):
    """One analysis: `parameters` is a frozen dataclass; `prepared` are the pairs that it reads, by the name it has for them.

    `reads` are trainings and evaluations of a sweep, in the order in which the analysis wants them.
    """

    analysis: str
    version: int
    parameters: Any
    base: BaseModel | None = None
    prepared: tuple[tuple[str, PrepareStage], ...] = ()
    reads: tuple[TrainStage | EvaluateStage, ...] = ()
    kind = "analyse"

    def _content_key(self) -> str:
        """Hash of the parameters, the model, the pairs, and what is read of a sweep."""
        model = {} if self.base is None else {"model": self.base.key, "precision": self.base.precision}
        read = {"reads": [stage.key for stage in self.reads]} if self.reads else {}
        return content_key(
            self.kind,
            self.version,
            analysis=self.analysis,
            parameters=self.parameters,
            data={name: stage.key for name, stage in self.prepared},
            **model,
            **read,
        )

    @property
    def label(self) -> str:
        """For people."""
        return self.analysis if self.base is None else f"{self.analysis} of {self.base.name}"

    @property
    def needs(self) -> tuple[Stage, ...]:
        """The model and the pairs."""
        model = () if self.base is None else self.base.needs
        return (*model, *(stage for _, stage in self.prepared))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What an analysis computes from: where the model is (folder or hub id, with its revision), and tokenised pairs.

    From `store` it may read what its parameters name by key. What it `say`s appears on the terminal while it computes.
    """

    name: str
    location: str
    base: BaseModel | None
    pairs: dict[str, list[Any]]
    store: Store
    say: Callable[[str], None]


# Fills the attempt's folder, summary.md at the least; what it notes goes into the manifest.
Compute = Callable[[AnalyseStage, Inputs, Attempt], None]


def compute_all(session: Session, stages: Sequence[AnalyseStage], compute: Compute) -> None:
    """Compute the stages, one after the other in this process."""
    stop = StopRequest(0.0)
    with (
        quiet(session.driver_log, session.console.width) as terminal,
        stop.listening(),
        Heartbeat(session.store.root, session.sweep_name) as heartbeat,
    ):
        claims = Claims(session.store.root, heartbeat.driver)
        backend = InlineBackend(Execution(store=session.store, claims=claims), _nobody, stop)
        for stage in stages:
            _compute_missing(stage, backend, compute, terminal)


def _nobody(event: Event) -> None:
    """No trial waits for what happens to an analysis."""


def _compute_missing(
    stage: AnalyseStage, backend: InlineBackend, compute: Compute, terminal: Console
) -> None:
    store, claims = backend.execution.store, backend.execution.claims
    backend.shared(stage.needs)
    name = f"{stage.kind}-{stage.key}"
    with claims.held(name, lambda: store.complete(stage.kind, stage.key), backend.pause) as ours:
        if not ours:
            return
        store.remove_leftovers(stage.kind, stage.key)
        inputs = _inputs(stage, store, terminal)
        with store.write(stage.kind, stage.key, parameters=dataclasses.asdict(stage.parameters)) as attempt:
            compute(stage, inputs, attempt)


def _inputs(stage: AnalyseStage, store: Store, terminal: Console) -> Inputs:
    from trainers.token_files import read_tokens

    def say(text: str) -> None:
        terminal.print(text, markup=False, highlight=False, soft_wrap=True)

    return Inputs(
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
