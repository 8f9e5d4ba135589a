"""Comparison of two sweeps: their accuracies on evaluation sets of the same names, and the differences."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.report.comparison import Analysis, Mean, Scope
from orchestrator.report.house_style import dots, legend, name_rows, panels, rendered
from orchestrator.report.page import Page, known_baseline, report_command, write_page
from orchestrator.report.results import TrialResult, on_common_pairs, sweep_results
from orchestrator.report.statistics import Estimate
from orchestrator.report.tables import MEAN, Table, interval, reward_title
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, declared_sweeps, read_declaration, read_state
from trainers.errors import SpecError, nearest
from trainers.specs import clean_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Row(NamedTuple):
    """An accuracy, or a difference of reward types, of a model or of the mean of models: in both sweeps, and theirs − ours.

    If both sweeps have it, all three values are over the models and seeds that both have.
    """

    train_set: str
    category: str
    model: str
    what: str
    is_difference: bool
    here: Estimate | None
    there: Estimate | None
    there_minus_here: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The page that was written, its table and its conclusions."""

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
    declaration: Declaration,
    store: Store,
    other: Declaration,
    other_store: Store,
    baseline: str | None = None,
) -> Comparison:
    """Write report/compare-<other>/compare.html with its tables and figure."""
    ours, theirs = list(sweep_results(declaration, store)), list(sweep_results(other, other_store))
    shared = on_common_pairs([*ours, *theirs])
    left, right = shared[: len(ours)], shared[len(ours) :]
    folder = store.local_sweep_dir(declaration.sweep) / "report"
    here = Analysis(left, known_baseline(declaration, folder, baseline))
    theirs_too = here.baseline in {item.record.reward for item in right}
    sides = (here, Analysis(right, here.baseline if theirs_too else None))
    names = (declaration.sweep, other.sweep)
    # The same sweep in two stores has the same name twice.
    if names[0] == names[1]:
        names = (names[0], f"{names[1]} (in {other_store.root.name})")
    rows = list(_rows(*sides))
    table = Table(
        name="comparison",
        title="Accuracy in both sweeps",
        note=" ".join([_note(sides), *_fewer([*ours, *theirs], shared)]),
        columns="train_set category model what here there there_minus_here",
        titles={"what": "reward", "here": names[0], "there": names[1], "there_minus_here": "difference"},
        rows=[row._asdict() for row in rows],
        forms={"there_minus_here": "+.3f"},
    )
    missing = _missing(sides, names)
    drawn = rendered(
        "both", "Both sweeps", "Mean over models, with 95 % intervals.", lambda: _figure(rows, names)
    )
    command = report_command(read_state(declaration.sweep, store), declaration.sweep)
    folder /= f"compare-{clean_name(names[1])}"
    page = Page(
        title=f"{names[0]} beside {names[1]}",
        lead="Paired by model, seed and test pair wherever both have them.",
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
    """Return the comparison for a terminal, which has room for the intervals of the differences only."""
    rows = [
        {
            **row,
            **{name: value.value for name in ("here", "there") if isinstance(value := row[name], Estimate)},
        }
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=rows)


def _rows(ours: Analysis, theirs: Analysis) -> Iterator[_Row]:
    """Yield accuracies by category, of each model and of the mean over the models that both sweeps have.

    Only the sets that both sweeps have count.
    """
    scopes = [
        {(scope.train_set, scope.category): scope for scope in side.categories()} for side in (ours, theirs)
    ]
    for place in dict.fromkeys((*scopes[0], *scopes[1])):
        found = [side.get(place) for side in scopes]
        known = [scope for scope in found if scope]
        names = tuple(name for name in known[0].sets if all(name in scope.sets for scope in known))
        if not names:
            continue
        scope = dataclasses.replace(known[0], sets=names)
        models = [*dict.fromkeys((*ours.models, *theirs.models))]
        whole = [side.complete_models(scope) for side, own in zip((ours, theirs), found, strict=True) if own]
        means = [model for model in models if all(model in of_side for of_side in whole)]
        kinds: list[tuple[str, ...]] = [(kind,) for kind in dict.fromkeys((*ours.rewards, *theirs.rewards))]
        gaps = [(ours.baseline, other) for other in ours.others]
        asked = [(model, [model], kind) for model in models for kind in kinds]
        asked += [(MEAN, means, kind) for kind in (*kinds, *gaps)]
        for name, over, types in asked:
            what = " − ".join(map(reward_title, types))
            if any(values := _values(ours, theirs, scope, over, types)):
                yield _Row(*place, name, what, len(types) > 1, *values)


def _values(
    ours: Analysis, theirs: Analysis, scope: Scope, models: Sequence[str], kinds: tuple[str, ...]
) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """Return the value of each sweep, and theirs − ours, over the models and seeds that both have."""
    here, there = (
        {model: seeds for model in models if (seeds := side.cells(scope, model, kinds))}
        for side in (ours, theirs)
    )
    signs = (1, -1)[: len(kinds)]

    def mean(
        found: Mapping[str, Mapping[int, tuple[TrialResult, ...]]], signs: tuple[int, ...]
    ) -> Estimate | None:
        if not found:
            return None
        groups, added = {**theirs.groups, **ours.groups}, ours.added
        return Mean(
            scope=scope, metric="accuracy", cells=found, signs=signs, groups=groups, added=added
        ).estimate

    # If no seed is in both sweeps, seeds are paired in their order.
    pairs = {
        model: [(seed, seed) for seed in here[model] if seed in there[model]]
        or list(zip(here[model], there[model], strict=False))
        for model in here
        if model in there
    }
    if not pairs:
        return mean(here, signs), mean(there, signs), None
    here = {model: {seed: here[model][seed] for seed, _ in found} for model, found in pairs.items()}
    there = {model: {seed: there[model][own] for seed, own in found} for model, found in pairs.items()}
    both = {
        model: {seed: (*there[model][seed], *here[model][seed]) for seed in seeds}
        for model, seeds in here.items()
    }
    return mean(here, signs), mean(there, signs), mean(both, (*signs, *(-sign for sign in signs)))


def _note(sides: tuple[Analysis, Analysis]) -> str:
    ours, theirs = (
        {item.dataset: item.dataset_digest for result in side.results for item in result.record.evaluations}
        for side in sides
    )
    other = [name for name in sorted(ours) if theirs.get(name, ours[name]) != ours[name]]
    note = "– if a sweep has no such number. Numbers that both sweeps have are over the sets, models and seeds that both have."
    return note + (f" Sets of the same name with different pairs: {', '.join(other)}." if other else "")


def _fewer(whole: Sequence[TrialResult], shared: Sequence[TrialResult]) -> list[str]:
    """Name the sets that are compared on fewer pairs than were scored."""
    pairs = {item.dataset: len(item.scores.index) for result in shared for item in result.evaluations}
    fewer = dict.fromkeys(
        item.dataset
        for result in whole
        for item in result.evaluations
        if len(item.scores.index) != pairs.get(item.dataset)
    )
    said = ", ".join(f"{name} ({pairs.get(name, 0)})" for name in fewer)
    return [f"Compared on the pairs that all models of both have: {said}."] if fewer else []


def _conclusions(rows: Sequence[_Row], names: tuple[str, str], missing: str) -> tuple[str, ...]:
    gaps = [(row.there_minus_here, row) for row in rows if row.there_minus_here and not row.is_difference]
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
    """Say whether the differences of reward types have the same sign in both sweeps."""
    both = {
        f"{row.train_set}: {row.category}, {row.what}": row.here.value * row.there.value
        for row in rows
        if row.is_difference and row.here and row.there
    }
    if not both:
        return "No category has the same two reward types in both sweeps."
    other = [place for place, product in both.items() if product < 0]
    if not other:
        return f"No difference of reward types has another sign: {len(both)} are in both sweeps."
    return f"{len(other)} of the {len(both)} differences of reward types that both have change their sign ({'; '.join(other)})."


def _missing(sides: tuple[Analysis, Analysis], names: tuple[str, str]) -> str:
    parts = [
        f"{name} lacks {lacking} of {len(side.results)} trials"
        for name, side in zip(names, sides, strict=True)
        if (lacking := sum(not result.complete for result in side.results))
    ]
    return f"Incomplete: {'; '.join(parts)}. Missing trials are not imputed." if parts else ""


def _figure(rows: Sequence[_Row], names: tuple[str, str]) -> "Figure | None":
    means = [row for row in rows if row.model == MEAN and not row.is_difference]
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
