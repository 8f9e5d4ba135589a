"""Analyses of what a finished sweep has scored: its evaluations are read from the store, and nothing is trained."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from orchestrator.cli.analyses import AnalysisOptions
from orchestrator.cli.session import Session
from orchestrator.report.common_pairs import left_out_lines, on_common_pairs
from orchestrator.report.results import TrialResult, sweep_results
from orchestrator.report.tables import Table, markdown, parquet_bytes
from orchestrator.spec.analyses import AnalyseStage
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, TrialRecord, declared_sweeps, read_declaration
from trainers.errors import SpecError
from trainers.specs import given_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(AnalysisOptions):
    """What every analysis of a sweep's scores takes."""

    sweep: Annotated[str, tyro.conf.arg(metavar="NAME")] = "full_grid"
    """The sweep in the same storage whose scores are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What the results depend on: the trials that are complete, whole, and how many are not."""

    trials: tuple[TrialRecord, ...]
    missing: int


def declare_scored(
    options: ScoredOptions, session: Session, *, analysis: str, version: int
) -> Sequence[AnalyseStage]:
    """One analysis of the sweep's complete trials. Raises SpecError where there is none."""
    parameters = scored(session.store, options.sweep)
    return [AnalyseStage(analysis=analysis, version=version, parameters=parameters)]


def scored(store: Store, sweep: str) -> Scored:
    """The sweep's complete trials. Raises SpecError where there is none."""
    name = given_name("--sweep", sweep)
    if name not in declared_sweeps(store):
        known = ", ".join(declared_sweeps(store)) or "none"
        raise SpecError(
            f"--sweep {sweep}: {store.root} knows no sweep of that name (it knows {known}); run it first."
        )
    trials = read_declaration(name, store).trials
    complete = tuple(
        # What a result was trained with is in its key.
        replace(trial, parameters={})
        for trial in trials
        if trial.whole(store)
    )
    if not complete:
        raise SpecError(f"--sweep {sweep}: none of its {len(trials)} trials is complete; run it first.")
    return Scored(trials=complete, missing=len(trials) - len(complete))


def results_of(parameters: Scored, store: Store) -> Sequence[TrialResult]:
    """The trials with their scores, on the pairs that all of them have."""
    return on_common_pairs(sweep_results(Declaration(sweep="", trials=parameters.trials), store))


def rests_on(parameters: Scored, store: Store) -> str:
    """Sentences on how much was read, and which pairs are over the length limits."""
    models, seeds = (
        sorted({str(getattr(trial, name)) for trial in parameters.trials}) for name in ("model", "seed")
    )
    said = [f"{len(parameters.trials)} trials: {', '.join(models)}; seeds {', '.join(seeds)}."]
    if parameters.missing:
        said.append(f"Missing: {parameters.missing} trials, and nothing stands in for them.")
    results = sweep_results(Declaration(sweep="", trials=parameters.trials), store)
    said += [f"{line[:1].upper()}{line[1:]}." for line in left_out_lines(results)]
    return " ".join(said)


def write_analysis(folder: Path, title: str, paragraphs: Iterable[str], tables: Sequence[Table]) -> None:
    """summary.md of paragraphs and then tables, and every table as parquet."""
    lines = [f"# {title}", ""]
    for paragraph in paragraphs:
        lines += [paragraph, ""]
    for table in tables:
        lines += [f"{table.title}. {table.note}", "", markdown(table), ""]
        (folder / f"{table.name}.parquet").write_bytes(parquet_bytes(table))
    (folder / "summary.md").write_text("\n".join(lines))


def write_figure(folder: Path, name: str, draw: "Callable[[], Figure | None]") -> None:
    """figures/`name` as PNG and SVG in the report's style, where there is something to draw."""
    from orchestrator.report.house_style import rendered

    drawn: Any = rendered(name, name, "", draw)
    if drawn is None:
        return
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / f"{name}.png").write_bytes(drawn.png)
    (folder / "figures" / f"{name}.svg").write_bytes(drawn.svg)
