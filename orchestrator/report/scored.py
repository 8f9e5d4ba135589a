"""The command of an analysis of what a sweep has scored: its evaluations are read from the store, and nothing is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from orchestrator.cli.analyses import AnalysisOptions
from orchestrator.cli.session import Session
from orchestrator.report.results import scored
from orchestrator.spec.analyses import AnalyseStage


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(AnalysisOptions):
    """What every analysis of a sweep's scores takes."""

    sweep: Annotated[str, tyro.conf.arg(metavar="NAME")] = "full_grid"
    """The sweep in the same storage whose scores are read."""


def declare_scored(
    options: ScoredOptions, session: Session, *, analysis: str, version: int
) -> Sequence[AnalyseStage]:
    """One analysis of the sweep's complete trials. Raises SpecError where there is none."""
    parameters = scored(session.store, options.sweep)
    return [AnalyseStage(analysis=analysis, version=version, parameters=parameters)]
