"""Two sweeps side by side: what both have evaluated under the same names, and how far apart it is."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.report import statistics
from orchestrator.report.comparison import Analysis, Mean, Scope
from orchestrator.report.house_style import dots, legend, name_rows, panels, rendered
from orchestrator.report.page import Bar, Page, draw, no_bar, report_command, write_page
from orchestrator.report.results import TrialResult, on_common_pairs, sweep_results
from orchestrator.report.statistics import Estimate
from orchestrator.report.tables import COMPARED, MEAN, Table, interval, reward_title
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, declared_sweeps, read_declaration, read_state
from trainers.errors import SpecError, nearest
from trainers.specs import clean_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIFFERENCE = "EX−IM"


class _Row(NamedTuple):
    """An accuracy of a model, or of the mean of models, by one reward type, or EX−IM: in both sweeps, and theirs − ours."""

    train_set: str
    category: str
    model: str
    what: str
    here: Estimate | None
    there: Estimate | None
    there_minus_here: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was written: the page, its table, and the sentences that it begins with."""

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
    declaration: Declaration, store: Store, other: Declaration, other_store: Store, bar: Bar = no_bar
) -> Comparison:
    """Write report/compare-<other>/compare.html with its tables and figure."""
    ours, theirs = list(sweep_results(declaration, store)), list(sweep_results(other, other_store))
    shared = on_common_pairs([*ours, *theirs])
    sides = (Analysis(shared[: len(ours)]), Analysis(shared[len(ours) :]))
    for side in sides:
        draw(side, bar)
    names = (declaration.sweep, other.sweep)
    # One sweep in two stores has one name.
    if names[0] == names[1]:
        names = (names[0], f"{names[1]} (in {other_store.root.name})")
    rows = _rows(*sides)
    table = Table(
        name="comparison",
        title="Accuracy in both sweeps",
        note=" ".join([_note(sides), *_fewer([*ours, *theirs], shared)]),
        columns="train_set category model what here there there_minus_here",
        titles={"here": names[0], "there": names[1], "there_minus_here": f"{names[1]} − {names[0]}"},
        rows=[row._asdict() for row in rows],
        forms={"there_minus_here": "+.3f"},
    )
    missing = _missing(sides, names)
    drawn = rendered(
        "both", "Both sweeps", "Mean over models, with 95 % intervals.", lambda: _figure(rows, names)
    )
    command = report_command(read_state(declaration.sweep, store), declaration.sweep)
    folder = store.local_sweep_dir(declaration.sweep) / "report" / f"compare-{clean_name(names[1])}"
    page = Page(
        title=f"{names[0]} beside {names[1]}",
        lead="The same test pairs and seeds are drawn for both wherever both have them.",
        conclusions=_conclusions(rows, names, missing),
        warning=missing,
        command=f"{command} --compare {other.sweep}",
        figures=(drawn,) if drawn else (),
        tables=(table,),
    )
    write_page(folder, page, "compare.html")
    store.share(folder)
    return Comparison(file=folder / "compare.html", table=table, conclusions=page.conclusions)


def without_intervals(table: Table) -> Table:
    """Return the comparison for a terminal, with intervals of the differences alone."""
    rows = [
        {
            **row,
            **{name: value.value for name in ("here", "there") if isinstance(value := row[name], Estimate)},
        }
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=rows)


def _rows(ours: Analysis, theirs: Analysis) -> list[_Row]:
    left, right = dict(_known(ours, theirs)), dict(_known(theirs, ours))
    found = []
    for place in dict.fromkeys((*left, *right)):
        a, b = left.get(place), right.get(place)
        gap = statistics.estimate(b.value - a.value, b.draws - a.draws) if a and b else None
        found.append(_Row(*place, a.estimate if a else None, b.estimate if b else None, gap))
    return found


def _known(analysis: Analysis, other: Analysis) -> Iterator[tuple[tuple[str, str, str, str], Mean]]:
    """Yield accuracies by category: of each model, and the mean over those of its models that both sweeps have.

    A category that both have is of the sets that both have.
    """
    elsewhere = {(scope.train_set, scope.category): scope for scope in other.categories()}
    for own in analysis.categories():
        there = elsewhere.get((own.train_set, own.category))
        scope = _with_sets(own, there)
        if not scope.sets:
            continue
        models = analysis.complete_models(scope)
        if there:
            both = other.complete_models(_with_sets(there, own))
            models = [model for model in models if model in both]
        asked: dict[tuple[str, str], Mean | None] = {}
        for kind in analysis.rewards:
            for model in analysis.models:
                asked[model, reward_title(kind)] = analysis.mean(scope, model, kind, "accuracy")
            asked[MEAN, reward_title(kind)] = analysis.mean_of_models(scope, kind, "accuracy", models)
        asked[MEAN, DIFFERENCE] = analysis.difference(scope, "accuracy", models)
        for (model, what), item in asked.items():
            if item is not None:
                yield (scope.train_set, scope.category, model, what), item


def _with_sets(scope: Scope, other: Scope | None) -> Scope:
    """Return the scope with those of its sets that the other has."""
    sets = scope.sets if other is None else tuple(name for name in scope.sets if name in other.sets)
    return dataclasses.replace(scope, sets=sets)


def _note(sides: tuple[Analysis, Analysis]) -> str:
    ours, theirs = (
        {item.dataset: item.dataset_digest for result in side.results for item in result.record.evaluations}
        for side in sides
    )
    other = [name for name in sorted(ours) if theirs.get(name, ours[name]) != ours[name]]
    note = "– where a sweep has no such number. Categories and means are of the sets and models that both sweeps have."
    return note + (f" Of one name but other pairs: {', '.join(other)}." if other else "")


def _fewer(whole: Sequence[TrialResult], shared: Sequence[TrialResult]) -> list[str]:
    """Say which sets are compared on fewer pairs than were scored."""
    pairs = {item.dataset: len(item.scores.index) for result in shared for item in result.evaluations}
    fewer = dict.fromkeys(
        item.dataset
        for result in whole
        for item in result.evaluations
        if len(item.scores.index) != pairs.get(item.dataset)
    )
    said = ", ".join(f"{name} ({pairs.get(name, 0)})" for name in fewer)
    return [f"On the pairs that all models of both have: {said}."] if fewer else []


def _conclusions(rows: Sequence[_Row], names: tuple[str, str], missing: str) -> tuple[str, ...]:
    gaps = [(row.there_minus_here, row) for row in rows if row.there_minus_here and row.what != DIFFERENCE]
    if not gaps:
        return (f"{names[0]} and {names[1]} have no number in common.", *filter(None, [missing]))
    furthest, row = max(gaps, key=lambda item: abs(item[0].value))
    if furthest.value == 0:
        return (f"All {len(gaps)} accuracies that both sweeps have are equal.", _answers(rows))
    apart = sum(gap.excludes_zero for gap, _ in gaps)
    whose = "the mean of models" if row.model == MEAN else row.model
    return (
        f"Of {len(gaps)} accuracies that both sweeps have, {apart} differ with a 95 % interval that excludes 0.",
        f"Furthest apart is {row.what} of {whose}, trained on {row.train_set}, "
        f"{row.category}: {interval(furthest)} from {names[0]} to {names[1]}.",
        _answers(rows),
    )


def _answers(rows: Sequence[_Row]) -> str:
    """Say whether both sweeps say the same of EX−IM."""
    both = {
        f"{row.train_set}: {row.category}": row.here.value * row.there.value
        for row in rows
        if row.what == DIFFERENCE and row.here and row.there
    }
    if not both:
        return f"No category has {' and '.join(map(reward_title, COMPARED))} in both sweeps."
    other = [place for place, product in both.items() if product < 0]
    if not other:
        return f"{DIFFERENCE} has no other sign in any of the {len(both)} categories that both have."
    return f"{DIFFERENCE} changes its sign in {len(other)} of the {len(both)} categories that both have ({', '.join(other)})."


def _missing(sides: tuple[Analysis, Analysis], names: tuple[str, str]) -> str:
    parts = [
        f"{name} lacks {lacking} of {len(side.results)} trials"
        for name, side in zip(names, sides, strict=True)
        if (lacking := sum(not result.complete for result in side.results))
    ]
    return f"Incomplete: {'; '.join(parts)}. Nothing stands in for them." if parts else ""


def _figure(rows: Sequence[_Row], names: tuple[str, str]) -> "Figure | None":
    means = [row for row in rows if row.model == MEAN and row.what != DIFFERENCE]
    if not means:
        return None
    figure, (axis,) = panels(1, 1, 6.6, 0.34 * len(means) + 0.9)
    sides = (
        ([row.here for row in means], "#0072B2", "o", "#0072B2"),
        ([row.there for row in means], "#D55E00", "s", "white"),
    )
    for number, (values, colour, marker, face) in enumerate(sides):
        found = {at + (number - 0.5) * 0.26: value for at, value in enumerate(values) if value}
        dots(axis, found, color=colour, marker=marker, markerfacecolor=face, label=names[number])
    name_rows(axis, [f"{row.train_set}: {row.category}, {row.what}" for row in means])
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("accuracy")
    legend(figure, [axis], columns=2)
    return figure
