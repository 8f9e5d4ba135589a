"""Comparison of two sweeps, by the parts of a report: the two sweeps stand where a report has reward types.

What is compared is what both have under the same names: training set, reward type and model, on sets of the same pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.report.comparison import Analysis
from orchestrator.report.conclusions import conclusions
from orchestrator.report.figures import every_figure
from orchestrator.report.page import Page, report_command, warning, write_page
from orchestrator.report.results import TrialResult, on_common_pairs, sweep_results
from orchestrator.report.summary import statistics_tables
from orchestrator.report.tables import Table, reward_title
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, declared_sweeps, read_declaration, read_state
from trainers.errors import SpecError, nearest
from trainers.specs import clean_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The page that was written, its table of accuracies and its conclusions."""

    file: Path
    table: Table
    conclusions: Sequence[str]


def other_sweep(named: str, store: Store) -> tuple[Declaration, Store]:
    """Return the sweep called `named` in the store, or in the folder <storage>/sweeps/<name>. Raises SpecError."""
    folder = Path(named).expanduser()
    if (folder / "sweep.json").is_file() and folder.absolute().parent.name == "sweeps":
        elsewhere = Store(folder.absolute().parents[1])
        return read_declaration(folder.absolute().name, elsewhere), elsewhere
    known = declared_sweeps(store)
    if named in known:
        return read_declaration(named, store), store
    hint = nearest(named, known) if known else "it knows none."
    raise SpecError(
        f"--compare {named}: no folder with a sweep.json, and {store.root} knows no such sweep; {hint}"
    )


def write_comparison(
    declaration: Declaration, store: Store, other: Declaration, other_store: Store
) -> Comparison:
    """Write report/compare-<other>/compare.html with its tables and figures. Differences are this sweep − the other."""
    names = (declaration.sweep, other.sweep)
    # The same sweep in two stores has the same name twice.
    if names[0] == names[1]:
        names = (names[0], f"{names[1]}@{clean_name(other_store.root.name)}")
    sides = (sweep_results(declaration, store), sweep_results(other, other_store))
    trials = set.intersection(*({_trial(item) for item in side} for side in sides))
    placed = [{place for item in side for place in _sets(item)} for side in sides]
    sets = set.intersection(*placed)
    both = [
        _of_sweep(item, name, sets)
        for name, side in zip(names, sides, strict=True)
        for item in side
        if _trial(item) in trials
    ]
    analysis = Analysis(on_common_pairs(both))
    tables = list(statistics_tables(analysis))
    said: tuple[str, ...] = conclusions(analysis)
    if not analysis.differences():
        said = (
            f"{names[0]} and {names[1]} share no model and seed that learned in both and was evaluated on the same pairs.",
        )
    if left := sorted({name for _, _, name, _ in set.union(*placed) - sets}):
        said = (*said, f"Not compared, since one sweep lacks it or has other pairs of it: {', '.join(left)}.")
    command = report_command(read_state(declaration.sweep, store), declaration.sweep)
    folder = store.local_sweep_dir(declaration.sweep) / "report" / f"compare-{clean_name(names[1])}"
    page = Page(
        title=f"{names[0]} beside {names[1]}",
        lead="Of what both have under the same names, paired by model, seed and test pair.",
        conclusions=said,
        warning=warning(both, analysis.results),
        command=f"{command} --compare {other.sweep}",
        figures=list(every_figure(analysis, {})),
        tables=tables,
    )
    write_page(folder, page, "compare.html")
    store.share(folder)
    accuracies = next(table for table in tables if table.name == "accuracy_by_category")
    return Comparison(file=folder / "compare.html", table=accuracies, conclusions=said)


def _trial(result: TrialResult) -> tuple[str, str, str]:
    return result.record.train_set, result.record.reward, result.record.model


def _sets(result: TrialResult) -> Iterator[tuple[str, str, str, str]]:
    """Name the evaluation sets of a trial; sets of one name may hold other pairs."""
    for item in result.record.evaluations:
        yield result.record.train_set, item.category, item.dataset, item.dataset_digest


def _of_sweep(result: TrialResult, sweep: str, sets: set[tuple[str, str, str, str]]) -> TrialResult:
    """Return the trial on these sets, with the sweep's name in the place of its reward type."""
    record = result.record
    wanted = tuple(
        item for item, place in zip(record.evaluations, _sets(result), strict=True) if place in sets
    )
    keys = {item.key for item in wanted}
    trained_on = f"{record.train_set} as {reward_title(record.reward)}"
    return replace(
        result,
        record=replace(record, train_set=trained_on, reward=sweep, axes={}, evaluations=wanted),
        evaluations=tuple(item for item in result.evaluations if item.key in keys),
    )
