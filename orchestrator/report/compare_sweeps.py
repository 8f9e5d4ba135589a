"""Two sweeps side by side: what both have evaluated under the same names, and how far apart it is."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Union

from orchestrator.report import statistics
from orchestrator.report.comparison import Analysis, Mean, Scope
from orchestrator.report.house_style import panels, rendered, whiskers
from orchestrator.report.page import Bar, Page, analysed, no_bar, report_command, write_page
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


class _Compared(NamedTuple):
    """What is compared: the accuracy of a model, or of the mean of models, by one reward type; or EX−IM."""

    train_set: str
    category: str
    model: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was written: the page, its table, and the sentences that it begins with."""

    file: Path
    table: Table
    conclusions: Sequence[str]


class _Found(NamedTuple):
    """A number in both sweeps, and theirs − ours."""

    here: Estimate | None
    there: Estimate | None
    gap: Estimate | None


def other_sweep(named: str, store: Store) -> tuple[Declaration, Store]:
    """The sweep called `named` in the store, or in the folder <storage>/sweeps/<name>. Raises SpecError."""
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
    sides = (analysed(shared[: len(ours)], bar), analysed(shared[len(ours) :], bar))
    names = (declaration.sweep, other.sweep)
    # One sweep in two stores has one name.
    if names[0] == names[1]:
        names = (names[0], f"{names[1]} (in {other_store.root.name})")
    found = _both(*sides)
    table = Table(
        name="comparison",
        title="Accuracy in both sweeps",
        note=" ".join([_note(sides), *_fewer([*ours, *theirs], shared)]),
        columns="train_set category model what here there there_minus_here",
        titles={"here": names[0], "there": names[1], "there_minus_here": f"{names[1]} − {names[0]}"},
        rows=[
            {**place._asdict(), "here": item.here, "there": item.there, "there_minus_here": item.gap}
            for place, item in found.items()
        ],
        forms={"there_minus_here": "+.3f"},
    )
    missing = _missing(sides, names)
    drawn = rendered(
        "both", "Both sweeps", "Mean over models, with 95 % intervals.", lambda: _figure(found, names)
    )
    command = report_command(read_state(declaration.sweep, store), declaration.sweep)
    folder = store.local_sweep_dir(declaration.sweep) / "report" / f"compare-{clean_name(names[1])}"
    page = Page(
        title=f"{names[0]} beside {names[1]}",
        lead="The same test pairs and seeds are drawn for both wherever both have them.",
        conclusions=_conclusions(found, names, missing),
        warning=missing,
        command=f"{command} --compare {other.sweep}",
        figures=(drawn,) if drawn else (),
        tables=(table,),
    )
    write_page(folder, page, "compare.html")
    store.share(folder)
    return Comparison(file=folder / "compare.html", table=table, conclusions=page.conclusions)


def without_intervals(table: Table) -> Table:
    """The comparison for a terminal: intervals only of what is between the sweeps."""
    rows = [
        {
            **row,
            **{name: value.value for name in ("here", "there") if isinstance(value := row[name], Estimate)},
        }
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=rows)


def _both(ours: Analysis, theirs: Analysis) -> dict[_Compared, _Found]:
    left, right = dict(_known(ours, theirs)), dict(_known(theirs, ours))
    found = {}
    for place in dict.fromkeys((*left, *right)):
        a, b = left.get(place), right.get(place)
        gap = None
        if a and b:
            gap = statistics.estimate(b.estimate.value - a.estimate.value, b.draws - a.draws)
        found[place] = _Found(here=a.estimate if a else None, there=b.estimate if b else None, gap=gap)
    return found


def _known(analysis: Analysis, other: Analysis) -> Iterator[tuple[_Compared, Mean]]:
    """Accuracies by category: of each model, and the mean over those of its models that both sweeps have.

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
                yield _Compared(scope.train_set, scope.category, model, what), item


def _with_sets(scope: Scope, other: Scope | None) -> Scope:
    """The scope with those of its sets that the other has."""
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
    """Which sets are compared on fewer pairs than were scored."""
    pairs = {item.dataset: len(item.scores.index) for result in shared for item in result.evaluations}
    fewer = dict.fromkeys(
        item.dataset
        for result in whole
        for item in result.evaluations
        if len(item.scores.index) != pairs.get(item.dataset)
    )
    said = ", ".join(f"{name} ({pairs.get(name, 0)})" for name in fewer)
    return [f"On the pairs that all models of both have: {said}."] if fewer else []


def _conclusions(found: Mapping[_Compared, _Found], names: tuple[str, str], missing: str) -> tuple[str, ...]:
    gaps = {place: item.gap for place, item in found.items() if item.gap and place.what != DIFFERENCE}
    if not gaps:
        return (f"{names[0]} and {names[1]} have no number in common.", *filter(None, [missing]))
    place, furthest = max(gaps.items(), key=lambda item: abs(item[1].value))
    if furthest.value == 0:
        return (f"All {len(gaps)} accuracies that both sweeps have are equal.", _answers(found))
    apart = sum(gap.excludes_zero for gap in gaps.values())
    whose = "the mean of models" if place.model == MEAN else place.model
    return (
        f"Of {len(gaps)} accuracies that both sweeps have, {apart} differ with a 95 % interval that excludes 0.",
        f"Furthest apart is {place.what} of {whose}, trained on {place.train_set}, "
        f"{place.category}: {interval(furthest)} from {names[0]} to {names[1]}.",
        _answers(found),
    )


def _answers(found: Mapping[_Compared, _Found]) -> str:
    """Whether both sweeps say the same of EX−IM."""
    both = [
        (f"{place.train_set}: {place.category}", item.here.value * item.there.value)
        for place, item in found.items()
        if place.what == DIFFERENCE and item.here and item.there
    ]
    if not both:
        return f"No category has {' and '.join(map(reward_title, COMPARED))} in both sweeps."
    other = [place for place, product in both if product < 0]
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


def _figure(found: Mapping[_Compared, _Found], names: tuple[str, str]) -> "Union[Figure, None]":
    means = {place: item for place, item in found.items() if place.model == MEAN and place.what != DIFFERENCE}
    if not means:
        return None
    figure, (axis,) = panels(1, 1, 6.6, 0.34 * len(means) + 0.9)
    for side, (colour, marker) in enumerate((("#0072B2", "o"), ("#D55E00", "s"))):
        rows = {row: value for row, item in enumerate(means.values()) if (value := item[side]) is not None}
        if rows:
            axis.errorbar(
                [value.value for value in rows.values()],
                [row + (side - 0.5) * 0.26 for row in rows],
                xerr=whiskers(list(rows.values())),
                linestyle="none",
                marker=marker,
                color=colour,
                markerfacecolor=colour if side == 0 else "white",
                capsize=2,
                label=names[side],
            )
    axis.set_yticks(
        range(len(means)), [f"{place.train_set}: {place.category}, {place.what}" for place in means]
    )
    axis.set_ylim(len(means) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("accuracy")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
