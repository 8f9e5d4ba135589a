"""One analysis as a stage: what is in its key, what it reads, and what its computing function is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.stages import BaseModel, EvaluateStage, Keyed, PrepareStage, Stage, TrainStage
from orchestrator.spec.trial_plan import TrialPlan
from orchestrator.spec.trials import content_key
from orchestrator.store.artifacts import Attempt, Store


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
        return content_key(
            self.kind,
            self.version,
            analysis=self.analysis,
            parameters=self.parameters,
            data={name: stage.key for name, stage in self.prepared},
            model=self.base and self.base.key,
            precision=self.base and self.base.precision,
            reads=[stage.key for stage in self.reads],
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
class AnalysisInputs:
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
Compute = Callable[[AnalyseStage, AnalysisInputs, Attempt], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowUp:
    """Which analyses a sweep's trials come to, what computes one, and whether that loads weights."""

    declare: Callable[[Sequence[TrialPlan]], Sequence[AnalyseStage]]
    compute: Compute
    loads_weights: bool = False
