"""Two sweeps side by side: what both have evaluated under the same names, and how far apart it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

from rich.console import Console
from rich.table import Table as TerminalTable

from orchestrator.report import statistics
from orchestrator.report.common_pairs import on_common_pairs
from orchestrator.report.comparison import Analysis
from orchestrator.report.house_style import panels, rendered, whiskers
from orchestrator.report.page import analysed
from orchestrator.report.pages import Page, write_page
from orchestrator.report.provenance import report_command
from orchestrator.report.results import TrialResult, sweep_results
from orchestrator.report.scopes import Scope
from orchestrator.report.statistics import Estimate, Floats
from orchestrator.report.summary import COMPARED, MEAN, reward_title
from orchestrator.report.tables import Column, Table, columns, text
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, declared_sweeps, read_declaration, read_state
from trainers.errors import SpecError, nearest
from trainers.specs import clean_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIFFERENCE = "EX−IM"
Place = tuple[str, str, str, str]
Known = tuple[Estimate, Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was written: the page, its table, and the sentences that it begins with."""

    file: Path
    table: Table
    conclusions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Accuracy of one (training set, category, model, reward type or EX−IM) in both sweeps."""

    place: Place
    ours: Estimate | None
    theirs: Estimate | None
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
    declaration: Declaration,
    store: Store,
    other: Declaration,
    other_store: Store,
    console: Console | None = None,
) -> Comparison:
    """Write report/compare-<other>/compare.html with its tables and figure."""
    ours = list(sweep_results(declaration, store))
    theirs = list(sweep_results(other, other_store))
    shared = on_common_pairs([*ours, *theirs])
    sides = (analysed(shared[: len(ours)], console), analysed(shared[len(ours) :], console))
    names = (declaration.sweep, other.sweep)
    # One sweep in two stores has one name.
    if names[0] == names[1]:
        names = (names[0], f"{names[1]} (in {other_store.root.name})")
    rows = list(_rows(*sides))
    table = _table(rows, names, " ".join([_note(sides), *_fewer([*ours, *theirs], shared)]))
    found = _conclusions(rows, sides, names)
    drawn = rendered(
        "both", "Both sweeps", "Mean over models, with 95 % intervals.", lambda: _figure(rows, names)
    )
    command = (
        f"{report_command(read_state(declaration.sweep, store), declaration.sweep)} --compare {other.sweep}"
    )
    folder = store.local_sweep_dir(declaration.sweep) / "report" / f"compare-{clean_name(names[1])}"
    page = Page(
        title=f"{names[0]} beside {names[1]}",
        lead="The same test pairs and seeds are drawn for both wherever both have them.",
        conclusions=found,
        warning=_missing(sides, names),
        command=command,
        figures=(drawn,) if drawn else (),
        tables=(table,),
    )
    write_page(folder, page, "compare.html")
    store.share(folder)
    return Comparison(file=folder / "compare.html", table=table, conclusions=found)


def _rows(ours: Analysis, theirs: Analysis) -> Iterator[_Row]:
    left, right = dict(_known(ours, theirs)), dict(_known(theirs, ours))
    for place in dict.fromkeys((*left, *right)):
        a, b = left.get(place), right.get(place)
        gap = statistics.estimate(b[0].value - a[0].value, b[1] - a[1]) if a and b else None
        yield _Row(place=place, ours=a and a[0], theirs=b and b[0], gap=gap)


def _known(analysis: Analysis, other: Analysis) -> Iterator[tuple[Place, Known]]:
    """Accuracies by category: of each model, and the mean over those of its models that both sweeps have.

    A category that both have is of the sets that both have.
    """
    elsewhere = {_place(scope): scope for scope in other.categories()}
    for own in analysis.categories():
        there = elsewhere.get(_place(own))
        sets = tuple(name for name in own.sets if there is None or name in there.sets)
        if not sets:
            continue
        scope = replace(own, sets=sets)
        models = analysis.complete_models(scope)
        if there:
            both = other.complete_models(replace(there, sets=sets))
            models = [model for model in models if model in both]
        for kind in analysis.rewards:
            for model in analysis.models:
                if found := analysis.mean(scope, model, kind, "accuracy"):
                    yield (*_place(scope), model, reward_title(kind)), (found.estimate, found.draws)
            if found := analysis.mean_of_models(scope, kind, "accuracy", models):
                yield (*_place(scope), MEAN, reward_title(kind)), (found.estimate, found.draws)
        gap = analysis.difference(scope, "accuracy", models)
        if gap is not None:
            yield (*_place(scope), MEAN, DIFFERENCE), (gap.estimate, gap.draws)


def _place(scope: Scope) -> tuple[str, str]:
    return scope.train_set, scope.category


def _table(rows: list[_Row], names: tuple[str, str], note: str) -> Table:
    return Table(
        name="comparison",
        title="Accuracy in both sweeps",
        note=note,
        columns=(
            *columns(
                ("train_set", "trained on"), ("category", "category"), ("model", "model"), ("what", "what")
            ),
            Column(name="here", title=names[0]),
            Column(name="there", title=names[1]),
            Column(name="there_minus_here", title=f"{names[1]} − {names[0]}", form="+.3f"),
        ),
        rows=tuple((*row.place, row.ours, row.theirs, row.gap) for row in rows),
    )


def _note(sides: tuple[Analysis, Analysis]) -> str:
    digests: tuple[dict[str, str], ...] = tuple(
        {item.dataset: item.dataset_digest for result in side.results for item in result.record.evaluations}
        for side in sides
    )
    shared = sorted(set(digests[0]) & set(digests[1]))
    other = [name for name in shared if digests[0][name] != digests[1][name]]
    note = "– where a sweep has no such number. Categories and means are of the sets and models that both sweeps have."
    return note + (f" Of one name but other pairs: {', '.join(other)}." if other else "")


def _fewer(whole: Sequence[TrialResult], shared: Sequence[TrialResult]) -> list[str]:
    """Which sets are compared on fewer pairs than were scored."""
    pairs = [
        {item.dataset: len(item.scores.index) for result in results for item in result.evaluations}
        for results in (whole, shared)
    ]
    fewer = [
        f"{name} ({pairs[1].get(name, 0)})"
        for name in pairs[0]
        if any(
            len(item.scores.index) != pairs[1].get(name)
            for result in whole
            for item in result.evaluations
            if item.dataset == name
        )
    ]
    return [f"On the pairs that all models of both have: {', '.join(fewer)}."] if fewer else []


def _conclusions(
    rows: list[_Row], sides: tuple[Analysis, Analysis], names: tuple[str, str]
) -> tuple[str, ...]:
    both = [row for row in rows if row.gap is not None and row.place[3] != DIFFERENCE]
    if not both:
        return (
            f"{names[0]} and {names[1]} have no number in common.",
            *filter(None, [_missing(sides, names)]),
        )
    apart = [row for row in both if row.gap and row.gap.excludes_zero]
    furthest = max(both, key=lambda row: abs(row.gap.value) if row.gap else 0.0)
    gap = text(furthest.gap, Column(name="", title="", form="+.3f"))
    if furthest.gap is not None and furthest.gap.value == 0:
        return (f"All {len(both)} accuracies that both sweeps have are equal.", _answers(rows, names))
    return (
        f"Of {len(both)} accuracies that both sweeps have, {len(apart)} differ with a 95 % interval that excludes 0.",
        f"Furthest apart is {furthest.place[3]} of {_whose(furthest)}, trained on {furthest.place[0]}, "
        f"{furthest.place[1]}: {gap} from {names[0]} to {names[1]}.",
        _answers(rows, names),
    )


def _whose(row: _Row) -> str:
    return "the mean of models" if row.place[2] == MEAN else row.place[2]


def _answers(rows: list[_Row], names: tuple[str, str]) -> str:
    """Whether both sweeps say the same of EX−IM."""
    gaps = [row for row in rows if row.place[3] == DIFFERENCE and row.ours and row.theirs]
    if not gaps:
        return f"No category has {' and '.join(map(reward_title, COMPARED))} in both sweeps."
    other = [row for row in gaps if row.ours and row.theirs and row.ours.value * row.theirs.value < 0]
    if not other:
        return f"{DIFFERENCE} has no other sign in any of the {len(gaps)} categories that both have."
    places = ", ".join(f"{row.place[0]}: {row.place[1]}" for row in other)
    return f"{DIFFERENCE} changes its sign in {len(other)} of the {len(gaps)} categories that both have ({places})."


def _missing(sides: tuple[Analysis, Analysis], names: tuple[str, str]) -> str:
    parts = [
        f"{name} lacks {lacking} of {len(side.results)} trials"
        for name, side in zip(names, sides, strict=True)
        if (lacking := sum(not result.complete for result in side.results))
    ]
    return f"Incomplete: {'; '.join(parts)}. Nothing stands in for them." if parts else ""


def _figure(rows: list[_Row], names: tuple[str, str]) -> "Union[Figure, None]":
    means = [row for row in rows if row.place[2] == MEAN and row.place[3] != DIFFERENCE]
    if not means:
        return None
    figure, (axis,) = panels(1, 1, 6.6, 0.34 * len(means) + 0.9)
    for side, (name, colour, marker) in enumerate(((names[0], "#0072B2", "o"), (names[1], "#D55E00", "s"))):
        found = [
            (number, value)
            for number, row in enumerate(means)
            if (value := (row.ours, row.theirs)[side]) is not None
        ]
        if not found:
            continue
        axis.errorbar(
            [value.value for _, value in found],
            [number + (side - 0.5) * 0.26 for number, _ in found],
            xerr=whiskers([value for _, value in found]),
            linestyle="none",
            marker=marker,
            color=colour,
            markerfacecolor=colour if side == 0 else "white",
            capsize=2,
            label=name,
        )
    axis.set_yticks(range(len(means)), [f"{row.place[0]}: {row.place[1]}, {row.place[3]}" for row in means])
    axis.set_ylim(len(means) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("accuracy")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def terminal_table(table: Table) -> TerminalTable:
    """For a terminal: the intervals only of what is between the sweeps."""
    shown = TerminalTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column.title, justify="left" if number < 4 else "right", overflow="fold")
    for row in table.rows:
        *place, here, there, gap = row
        plain = [value.value if isinstance(value, Estimate) else value for value in (here, there)]
        cells = zip((*place, *plain, gap), table.columns, strict=True)
        shown.add_row(*(text(value, column) for value, column in cells))
    return shown
