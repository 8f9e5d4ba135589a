"""The whole report of a sweep: statistics, figures, report.html. Written again only where something has changed.

<storage>/sweeps/<sweep>/report/summary.md  report.html  report.json  figures/*.png|svg  tables/*.csv|parquet
<storage>/sweeps/<sweep>/report/compare-<other>/compare.html  figures/  tables/
<storage>/sweeps/learning_dynamics/report/           drawn where sweeps/learning_dynamics.py has written it
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.cli.terminal import late_bar
from orchestrator.report import preference
from orchestrator.report.answers import statistics_tables
from orchestrator.report.audit_page import audit_sweep, audit_tables
from orchestrator.report.common_pairs import left_out_lines, left_out_table, on_common_pairs
from orchestrator.report.comparison import Analysis
from orchestrator.report.conclusions import conclusions
from orchestrator.report.controls import controlled
from orchestrator.report.curves import curve_rows
from orchestrator.report.figures import every_figure
from orchestrator.report.pages import Line, Page, Section, write_page
from orchestrator.report.per_pair import set_outcomes
from orchestrator.report.provenance import holes_table, made_with, report_command, run_command, trials_table
from orchestrator.report.published import spec_difference
from orchestrator.report.resampling import Resampled
from orchestrator.report.results import TrialResult, sweep_results
from orchestrator.report.summary import Written, table_rows, write_report
from orchestrator.report.training_figures import Curves
from orchestrator.store.artifacts import Store, versions
from orchestrator.store.records import Declaration, SweepState, read_state
from trainers.data.audit import Audit
from trainers.disk import digest_file, replace
from trainers.errors import DataError

# Raised by hand when the same results would give other pages.
VERSION = 3
NOTE = "report.json"
HTML = "report.html"
DYNAMICS = ("learning_dynamics", "changes.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that a report is made of; `compared` are the results on the pairs that all models have."""

    declaration: Declaration
    results: Sequence[TrialResult]
    compared: Sequence[TrialResult]
    curves: Curves
    state: SweepState
    dynamics: tuple[Path, ...]


def write_full_report(
    declaration: Declaration, store: Store, console: Console | None = None, *, anew: bool = False
) -> Written:
    """Write the report where it is not that of these results already, or in any case where `anew`.

    `console` shows how far it is. Raises DataError where a table of learning dynamics is not what it should be.
    """
    inputs = read_inputs(declaration, store)
    folder = store.local_sweep_dir(declaration.sweep) / "report"
    key = _key(inputs)
    if not anew and _is_fresh(folder, key):
        return Written(folder=folder, rows=table_rows(inputs.compared), results=inputs.results)
    audit = audit_sweep(declaration, store)
    analysis = analysed(inputs.compared, console)
    page = _page(inputs, analysis, audit, store, console)
    written = write_report(
        declaration,
        store,
        inputs.results,
        audit,
        conclusions=page.conclusions,
        tables=page.tables[:1],
        ending=f"\n{preference.TITLE}. {page.sections[-1].text}\n",
    )
    write_page(folder, page, HTML)
    note = {
        "key": key,
        "sweep": declaration.sweep,
        "trials": len(inputs.results),
        "complete": sum(result.complete for result in inputs.results),
        "conclusions": page.conclusions,
    }
    store.share(folder)
    # Last, as it says that the report is there.
    replace(folder / NOTE, json.dumps(note, indent=1, ensure_ascii=False))
    store.share(folder / NOTE)
    return written


def read_inputs(declaration: Declaration, store: Store) -> Inputs:
    """What the store holds of a sweep."""
    results = sweep_results(declaration, store)
    return Inputs(
        declaration=declaration,
        results=results,
        compared=on_common_pairs(results),
        curves={
            (item.record.train_set, item.record.model, item.record.reward, item.record.seed): curve_rows(
                store, item.record.key
            )
            for item in results
        },
        state=read_state(declaration.sweep, store),
        dynamics=tuple(sorted((store.local_sweep_dir(DYNAMICS[0]) / "report").rglob(DYNAMICS[1]))),
    )


def analysed(results: Sequence[TrialResult], console: Console | None) -> Analysis:
    """The results with their bootstrap draws."""
    with late_bar(console, "bootstrap over pairs and seeds") as step:
        return Analysis(results, Resampled(results, step=step))


def said_conclusions(folder: Path) -> list[str]:
    """The sentences of the report in `folder`."""
    try:
        return [str(sentence) for sentence in json.loads((folder / NOTE).read_text())["conclusions"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _key(inputs: Inputs) -> str:
    """Changes with whatever could change a page."""
    parts = [
        VERSION,
        versions()["rmsweep"],
        inputs.declaration.sweep,
        [
            (
                repr(item.record),
                item.trained_at,
                item.faults,
                repr(item.evaluations),
                item.train_accuracy,
                item.train_left_out,
            )
            for item in inputs.results
        ],
        [(key, len(rows)) for key, rows in inputs.curves.items()],
        inputs.state.command,
        {key: note.message for key, note in inputs.state.trials.items()},
        [digest_file(file) for file in inputs.dynamics],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_fresh(folder: Path, key: str) -> bool:
    files = [folder / "summary.md", folder / HTML, folder.parent / "trials.parquet"]
    try:
        return bool(json.loads((folder / NOTE).read_text())["key"] == key) and all(map(Path.is_file, files))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _page(inputs: Inputs, analysis: Analysis, audit: Audit, store: Store, console: Console | None) -> Page:
    results, state = inputs.results, inputs.state
    complete = sum(result.complete for result in results)
    sweep = inputs.declaration.sweep
    found = conclusions(analysis)
    left_out = left_out_table(results)
    computed = tuple(statistics_tables(analysis))
    with late_bar(console, "figures") as step:
        figures = []
        for figure in every_figure(analysis, inputs.curves, _dynamics(inputs.dynamics)):
            figures.append(figure)
            step(len(figures), 9)
    command = report_command(state, sweep)
    ran = run_command(state)
    return Page(
        title=sweep,
        lead=f"{complete} of {len(results)} trials complete: {', '.join(analysis.models)}; "
        f"trained on {', '.join(analysis.train_sets)}.",
        conclusions=found,
        warning=_warning(results, complete),
        command=command,
        figures=tuple(figures),
        tables=computed,
        sections=(
            Section(
                title="What could be fooling us",
                anchor="audit",
                tables=(*([left_out] if left_out.rows else []), *audit_tables(audit, inputs.compared)),
            ),
            Section(title="Beside the paper", anchor="paper", tables=(spec_difference(results),)),
            Section(
                title="How it was made",
                anchor="made",
                lines=(
                    *([Line(label="Trained and evaluated by", text=ran)] if ran else []),
                    Line(label="This report", text=command),
                ),
                tables=(made_with(results, store), trials_table(results)),
            ),
            Section(title="Holes", anchor="missing", tables=(holes_table(results, state),)),
            Section(
                title=preference.TITLE,
                anchor="prefer",
                text=preference.preference(controlled(set_outcomes(inputs.compared, store))),
            ),
        ),
    )


def _warning(results: Sequence[TrialResult], complete: int) -> str:
    """What is not in the numbers: missing trials, and pairs over the length limits."""
    said = [f"{line[:1].upper()}{line[1:]}." for line in left_out_lines(results)]
    if complete < len(results):
        missing = f"{len(results) - complete} of {len(results)} trials are missing"
        said.insert(
            0, f"Incomplete: {missing}. Nothing stands in for them; what is missing is listed at the end."
        )
    return " ".join(said)


def _dynamics(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Predicted and measured changes of reward."""
    from pyarrow import ArrowException, parquet

    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += parquet.read_table(file, columns=["reward", "predicted", "measured"]).to_pylist()
        except (ArrowException, OSError) as error:
            raise DataError(
                f"{file} is no table of reward, predicted and measured ({error}); run sweeps/learning_dynamics.py again."
            ) from error
    return rows
