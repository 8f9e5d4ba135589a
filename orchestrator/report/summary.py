"""What a sweep's scores say, as tables and as summary.md: accuracy by category, by epoch, without length and leaks.

A trial whose training accuracy is at chance is shown as not learned and enters no mean.
"""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from orchestrator.report import published
from orchestrator.report.audit import audit_sweep
from orchestrator.report.comparison import Analysis, Mean, Scope
from orchestrator.report.results import (
    TrialResult,
    left_out_lines,
    on_common_pairs,
    sweep_results,
    trial_rows,
)
from orchestrator.report.statistics import LEVEL, half_width
from orchestrator.report.tables import COMPARED, MEAN, NOTHING, Table, Value, mean_label, reward_title
from orchestrator.store.artifacts import Store
from orchestrator.store.records import CATEGORIES, Category, Declaration
from trainers.data.audit import Audit
from trainers.data.audit.findings import FINDINGS, SETS, set_row, share
from trainers.specs import clean_name
from trainers.storage import replace, replace_bytes

NOT_LEARNED = "not learned"
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "loss": "Loss, mean of −ln σ(r⁺ − r⁻)",
    "abs_margin": "Absolute margin, mean |r⁺ − r⁻| over the rewards' standard deviation",
}
SIDE_METRICS = {"accuracy_length_controlled": "length-controlled", "accuracy_leak_free": "leak-free"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedAccuracies:
    """Accuracy of one model, reward type, training set and category: one value per trained seed.

    `seeds` are those that learned, in their values' order; `missing` counts the trials that are not there.
    """

    learned: tuple[float, ...] = ()
    not_learned: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    missing: int = 0

    @property
    def mean(self) -> float | None:
        """Mean over learned seeds; None where no seed learned."""
        return statistics.fmean(self.learned) if self.learned else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over learned seeds; None below two."""
        return statistics.stdev(self.learned) if len(self.learned) > 1 else None

    def __str__(self) -> str:
        if self.mean is not None:
            text = f"{self.mean:.3f}" if self.std is None else f"{self.mean:.3f} ± {self.std:.3f}"
            text += f", {len(self.not_learned)} {NOT_LEARNED}" if self.not_learned else ""
        elif self.not_learned:
            text = f"{statistics.fmean(self.not_learned):.3f} {NOT_LEARNED}"
        else:
            return NOTHING
        return f"{text}, {self.missing} missing" if self.missing else text


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow:
    """One line of the table of accuracies: a cell for each reward type.

    `paired` are the means of EX-RM and IM-RM over what both have: over `paired_over` seeds, or in a line that is a mean
    over models. There `models` counts those of each type's mean, and `model` says how many they are.
    """

    train_set: str
    category: Category
    model: str
    cells: dict[str, SeedAccuracies]
    paired: tuple[float, float] | None
    paired_over: int
    models: dict[str, int]

    @property
    def difference(self) -> float | None:
        """EX−IM over what both have; None where that is nothing."""
        return None if self.paired is None else self.paired[0] - self.paired[1]

    @property
    def difference_text(self) -> str:
        """EX−IM, and over how many it is where a mean is over more."""
        if self.difference is None:
            return NOTHING
        counts = self.models or {kind: len(cell.learned) for kind, cell in self.cells.items()}
        if all(counts.get(kind) == self.paired_over for kind in COMPARED):
            return f"{self.difference:+.3f}"
        unit = "model" if self.models else "seed"
        plural = "s" if self.paired_over > 1 else ""
        return f"{self.difference:+.3f} over {self.paired_over} {unit}{plural}"


def table_rows(results: Sequence[TrialResult]) -> list[AccuracyRow]:
    """Every (training set, category, model) with at least one score, each category closed by its mean."""
    rows: list[AccuracyRow] = []
    models = list(dict.fromkeys(result.record.model for result in results))
    train_sets = dict.fromkeys(result.record.train_set for result in results)
    for train_set, category in itertools.product(train_sets, CATEGORIES):
        found = [row for model in models if (row := _row(results, train_set, category, model)) is not None]
        rows += found
        if len(found) > 1 and (mean := _mean(found)) is not None:
            rows.append(mean)
    return rows


def _row(
    results: Sequence[TrialResult], train_set: str, category: Category, model: str
) -> AccuracyRow | None:
    cells: dict[str, SeedAccuracies] = {}
    others = sorted({result.record.reward for result in results} - set(COMPARED))
    for kind in (*COMPARED, *others):
        asked = [
            item
            for item in results
            if (item.record.train_set, item.record.model, item.record.reward) == (train_set, model, kind)
            and any(wanted.category == category for wanted in item.record.evaluations)
        ]
        found = [(item, item.category_accuracy().get(category)) for item in asked]
        known = [(item, accuracy) for item, accuracy in found if accuracy is not None]
        cells[kind] = SeedAccuracies(
            learned=tuple(accuracy for item, accuracy in known if item.learned),
            not_learned=tuple(accuracy for item, accuracy in known if not item.learned),
            seeds=tuple(item.record.seed for item, _ in known if item.learned),
            missing=len(asked) - len(known),
        )
    if not any(cell.learned or cell.not_learned for cell in cells.values()):
        return None
    explicit, implicit = (dict(zip(cells[kind].seeds, cells[kind].learned, strict=True)) for kind in COMPARED)
    pairs = [(explicit[seed], implicit[seed]) for seed in explicit if seed in implicit]
    return AccuracyRow(
        train_set=train_set,
        category=category,
        model=model,
        cells=cells,
        paired=_pair_means(pairs),
        paired_over=len(pairs),
        models={},
    )


def _pair_means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    if not pairs:
        return None
    explicit, implicit = zip(*pairs, strict=True)
    return statistics.fmean(explicit), statistics.fmean(implicit)


def _mean(rows: Sequence[AccuracyRow]) -> AccuracyRow | None:
    """Over the models that have every reward type that they were asked for; one that no model has is not waited for."""
    known = {kind for row in rows for kind, cell in row.cells.items() if cell.learned}
    whole = [
        row
        for row in rows
        if all(
            cell.learned or not (cell.not_learned or cell.missing)
            for kind, cell in row.cells.items()
            if kind in known
        )
    ]
    means = {
        kind: [mean for row in whole if (mean := row.cells[kind].mean) is not None] for kind in rows[0].cells
    }
    models = {kind: len(found) for kind, found in means.items() if found}
    if not models:
        return None
    paired = [row.paired for row in rows if row.paired is not None]
    return AccuracyRow(
        train_set=rows[0].train_set,
        category=rows[0].category,
        model=mean_label(models),
        cells={
            kind: SeedAccuracies(learned=(statistics.fmean(found),) if found else ())
            for kind, found in means.items()
        },
        paired=_pair_means(paired),
        paired_over=len(paired),
        models=models,
    )


def accuracy_table(rows: Sequence[AccuracyRow]) -> Table:
    """The rows as people read them."""
    kinds = list(rows[0].cells) if rows else list(COMPARED)
    return Table(
        name="accuracy",
        title="accuracy by category",
        columns=f"train_set category model {' '.join(kinds)} difference",
        rows=[
            {
                "train_set": row.train_set,
                "category": row.category,
                "model": row.model,
                **{kind: str(cell) for kind, cell in row.cells.items()},
                "difference": row.difference_text,
            }
            for row in rows
        ],
    )


def accuracy_csv(rows: Sequence[AccuracyRow]) -> str:
    """The rows for a spreadsheet: numbers apart, seeds counted."""
    kinds = list(rows[0].cells) if rows else list(COMPARED)
    parts = ("mean", "std", "seeds", "not_learned", "missing")
    names = ("train_set", "category", "model", *(f"{kind}_{part}" for kind in kinds for part in parts))
    names = (*names, "ex_minus_im", "ex_minus_im_seeds", "ex_minus_im_models")
    flat: list[dict[str, Value]] = []
    for row in rows:
        values: list[Value] = [row.train_set, row.category, row.model]
        for cell in row.cells.values():
            counts = (len(cell.learned), len(cell.not_learned), cell.missing)
            # A mean over models has no seeds of its own.
            values += [cell.mean, cell.std, *([None] * 3 if row.models else counts)]
        over = (None, row.paired_over) if row.models else (row.paired_over, None)
        flat.append(dict(zip(names, (*values, row.difference, *over), strict=True)))
    return Table(name="accuracy", title="", columns=" ".join(names), rows=flat).csv()


def json_rows(rows: Sequence[AccuracyRow]) -> list[dict[str, Any]]:
    """The rows for a program: every seed's value, and the difference."""
    return [{**asdict(row), "difference": row.difference} for row in rows]


def epoch_table(results: Sequence[TrialResult], most: int | None = None) -> Table | None:
    """Accuracy after each epoch, of sets that are evaluated after several; None where there is none.

    What did not learn by its last epoch is in no mean. Of `most` epochs, evenly spaced, the first and the last are shown.
    """
    labels = ("train_set", "model", "reward", "evaluation_set")
    found: dict[tuple[str, ...], dict[int, list[float]]] = {}
    seeds: Counter[tuple[str, ...]] = Counter()
    for result in results:
        record = result.record
        if len({item.epoch for item in record.evaluations}) < 2 or (result.trained and not result.learned):
            continue
        seeds[record.train_set, record.model, record.reward] += 1
        for item in result.evaluations:
            line = (record.train_set, record.model, record.reward, item.dataset)
            found.setdefault(line, {}).setdefault(item.epoch or 0, []).append(item.metrics["accuracy"])
    if not found:
        return None
    epochs = sorted({epoch for values in found.values() for epoch in values})
    if most is not None and len(epochs) > most:
        epochs = [epochs[round(place * (len(epochs) - 1) / (most - 1))] for place in range(most)]

    def text(values: Sequence[float], asked: int) -> str:
        missing = asked - len(values)
        return f"{statistics.fmean(values):.3f}" + (f", {missing} missing" if missing else "")

    return Table(
        name="epochs",
        title="accuracy by epoch",
        columns=f"{' '.join(labels)} {' '.join(map(str, epochs))}",
        rows=[
            {
                **dict(zip(labels, line, strict=True)),
                **{str(epoch): text(values, seeds[line[:3]]) for epoch, values in by_epoch.items()},
            }
            for line, by_epoch in found.items()
        ],
    )


def statistics_tables(analysis: Analysis) -> Iterator[Table]:
    """Every table of statistics, the answer first."""
    if analysis.both:
        yield differences(analysis)
        yield win_rates(analysis)
    for metric in METRIC_TITLES:
        yield by_category(analysis, metric)
    yield by_set(analysis)
    yield calibrations(analysis)


def _place(scope: Scope) -> dict[str, Value]:
    return {"train_set": scope.train_set, "category": scope.category}


def _estimates(found: Mapping[str, Mean | None]) -> dict[str, Value]:
    return {name: item.estimate if item else None for name, item in found.items()}


def by_category(analysis: Analysis, metric: str) -> Table:
    """A metric by category and model, and the paper's mean beside ours where the sets correspond."""
    theirs = {
        (scope, kind): number
        for scope in analysis.categories()
        for kind in analysis.rewards
        if (number := published.number(scope.train_set, scope.sets, kind, metric)) is not None
    }
    rows: list[dict[str, Value]] = []
    for scope in analysis.categories():
        for model in analysis.models:
            means = {kind: analysis.mean(scope, model, kind, metric) for kind in analysis.rewards}
            if any(means.values()):
                rows.append({**_place(scope), "model": model, **_estimates(means)})
        over = {kind: analysis.mean_of_models(scope, kind, metric) for kind in analysis.rewards}
        if any(over.values()):
            label = mean_label({kind: len(mean.models) for kind, mean in over.items() if mean})
            said = {f"{kind}_paper": number for (place, kind), number in theirs.items() if place == scope}
            rows.append({**_place(scope), "model": label, **_estimates(over), **said})
    quoted = [kind for kind in analysis.rewards if any(kind == other for _, other in theirs)]
    note = (
        "Each: mean over the scope's sets, then over seeds ± standard deviation over seeds, "
        f"[{LEVEL:.0%} interval: bootstrap over test pairs and seeds]. "
        f"{MEAN.capitalize()} of n: the models that have every reward type."
    )
    if quoted:
        note += f" {published.SOURCE}: a second-hand summary; the mean of six models of 1B to 8B, on sets of these names."
    return Table(
        name=f"{metric}_by_category",
        title=f"{METRIC_TITLES[metric]}, by category",
        note=note,
        columns=" ".join(
            ("train_set category model", *analysis.rewards, *(f"{kind}_paper" for kind in quoted))
        ),
        titles={f"{kind}_paper": f"{reward_title(kind)}, the paper [S]" for kind in quoted},
        rows=rows,
    )


def differences(analysis: Analysis) -> Table:
    """EX−IM by category and model."""
    rows: list[dict[str, Value]] = []
    choices: list[list[str] | None] = [*([model] for model in analysis.models), None]
    for scope, models in itertools.product(analysis.categories(), choices):
        found = analysis.difference(scope, "accuracy", models)
        if found is None:
            continue
        others = {metric: analysis.difference(scope, metric, models) for metric in ("loss", "abs_margin")}
        rows.append(
            {
                **_place(scope),
                "model": models[0] if models else f"{MEAN} of {len(found.models)}",
                "accuracy": found.estimate,
                "p_pairs": found.p_pairs,
                "p_trainings": found.p_runs,
                "trainings": found.runs,
                "pairs": found.pairs,
                **_estimates(others),
            }
        )
    return Table(
        name="differences",
        title="EX−IM, paired by model, seed and pair",
        note="Above 0 in accuracy: EX-RM ranks more pairs right. p (pairs): signs flipped test pair by test pair, "
        "would other pairs say the same; p (trainings): flipped training by training, would other seeds and models; "
        "n trainings cannot give less than 2/2ⁿ. Not corrected for the number of rows.",
        columns="train_set category model accuracy p_pairs p_trainings trainings pairs loss abs_margin",
        titles={
            "p_pairs": "p (pairs)",
            "p_trainings": "p (trainings)",
            "trainings": "trainings of each type",
            "pairs": "pairs a set",
        },
        rows=rows,
        forms={**dict.fromkeys(METRIC_TITLES, "+.3f"), "p_pairs": ".4f", "p_trainings": ".4f"},
    )


def win_rates(analysis: Analysis) -> Table:
    """Which type is ahead in how many cells."""
    scopes = (*analysis.categories(), *analysis.single_sets())
    return Table(
        name="win_rates",
        title="Win-rate of EX-RM over IM-RM",
        note="Cells of model, seed and evaluation set; within one point of accuracy is a tie.",
        columns="train_set category evaluation_set cells ex_rm_ahead ties im_rm_ahead share",
        titles={"share": "share ahead"},
        rows=[
            {
                **_place(scope),
                "evaluation_set": scope.dataset or "all",
                "cells": found.cells,
                "ex_rm_ahead": found.ahead,
                "ties": found.ties,
                "im_rm_ahead": found.behind,
                "share": found.share,
            }
            for scope in scopes
            if (found := analysis.win_rate(scope)).cells
        ],
        forms={"share": ".0%"},
    )


def by_set(analysis: Analysis) -> Table:
    """Every evaluation set: accuracies of all kinds, loss and margin, by reward type."""
    rows: list[dict[str, Value]] = []
    for scope, model, kind in itertools.product(analysis.single_sets(), analysis.models, analysis.rewards):
        means = {name: analysis.mean(scope, model, kind, name) for name in METRIC_TITLES}
        if accuracy := means["accuracy"]:
            rows.append(
                {
                    **_place(scope),
                    "evaluation_set": scope.dataset,
                    "model": model,
                    "reward": reward_title(kind),
                    **_estimates(means),
                    **{name: analysis.side_metric(scope, model, kind, name) for name in SIDE_METRICS},
                    "seeds": accuracy.seeds,
                    "pairs": accuracy.pairs,
                    "half_width": f"± {half_width(accuracy.pairs):.2f}",
                }
            )
    return Table(
        name="sets",
        title="Every evaluation set",
        note="Length-controlled: matched strata of the length difference; leak-free: pairs that the training split does "
        "not hold (docs/audit.md); – where it was not measured. The last column: what the number of pairs alone leaves open at "
        "an accuracy of 0.75.",
        columns=f"train_set category evaluation_set model reward accuracy {' '.join(SIDE_METRICS)} loss abs_margin seeds pairs half_width",
        titles={"half_width": "± by pairs"},
        rows=rows,
    )


def calibrations(analysis: Analysis) -> Table:
    """Expected calibration error and Brier score, by category and reward type."""
    scopes = (*analysis.categories(), *analysis.single_sets())
    return Table(
        name="calibration",
        title="Calibration of σ(margin)",
        note="Over the pairs of all models and seeds. ECE: |accuracy − confidence| over ten bins of equally many "
        "pairs. Brier: mean (1 − σ(r⁺ − r⁻))², 0.25 for a coin.",
        columns="train_set category evaluation_set reward ece brier scores",
        titles={"ece": "ECE", "brier": "Brier"},
        rows=[
            {
                **_place(scope),
                "evaluation_set": scope.dataset or "all",
                "reward": reward_title(kind),
                "ece": found.expected_error,
                "brier": found.brier,
                "scores": found.pairs,
            }
            for scope, kind in itertools.product(scopes, analysis.rewards)
            if (found := analysis.calibration(scope, kind)) is not None
        ],
    )


def audit_tables(audit: Audit, results: Sequence[TrialResult]) -> list[Table]:
    """Accuracy without length and leaks, the audited sets, and the findings; those with no row are left out."""

    def table(
        name: str, title: str, note: str, header: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> Table:
        titles = {clean_name(title): title for title in header}
        shown = [dict(zip(titles, row, strict=True)) for row in rows]
        return Table(name=name, title=title, note=note, columns=" ".join(titles), titles=titles, rows=shown)

    found = (
        table(
            "controlled",
            "Accuracy without length and leaks",
            "Means over trials that learned. Length-controlled: matched strata of the length difference; leak-free: "
            "pairs that the training split does not hold; longer wins: what length alone reaches, in tokens. "
            "See docs/audit.md.",
            (
                *("trained on", "evaluated on", "reward", "accuracy", "length-controlled"),
                *("leak-free", "pairs", "leak-free pairs", "longer wins", "trainings"),
            ),
            _controlled_rows(results),
        ),
        table("audit_sets", "Sets", "Lengths in characters and words.", SETS, [*map(set_row, audit.sets)]),
        table(
            "audit_findings",
            "Findings",
            "The worst first.",
            FINDINGS,
            [found.row for found in audit.findings],
        ),
    )
    return [item for item in found if item.rows]


def _controlled_rows(results: Sequence[TrialResult]) -> list[tuple[str, ...]]:
    """A row per training set, evaluation set and reward type of which a trial learned."""
    cells: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for result in results:
        for item in result.final if result.learned else ():
            cell = (result.record.train_set, item.dataset, result.record.reward)
            cells.setdefault(cell, []).append(item.metrics)
    # Each name stands where the sweep has it first.
    orders = [list(dict.fromkeys(names)) for names in zip(*cells, strict=True)]

    def place(cell: tuple[str, str, str]) -> list[int]:
        return [order.index(name) for order, name in zip(orders, cell, strict=True)]

    return [(*cell, *_controlled_means(cells[cell])) for cell in sorted(cells, key=place)]


def _controlled_means(metrics: Sequence[dict[str, float]]) -> Iterator[str]:
    for name in ("accuracy", *SIDE_METRICS):
        values = [item[name] for item in metrics if name in item]
        # A mean over some of them could not be held against the plain one.
        yield share(statistics.fmean(values)) if len(values) == len(metrics) else NOTHING
    for name in ("n", "n_leak_free"):
        counts = [item[name] for item in metrics if name in item]
        yield f"{min(counts):.0f}" if counts else NOTHING
    yield share(statistics.fmean(item["longer_wins"] for item in metrics))
    yield str(len(metrics))


class Written(NamedTuple):
    """A report's folder, and what it was written from."""

    folder: Path
    rows: list[AccuracyRow]
    results: Sequence[TrialResult]
    compared: Sequence[TrialResult]


def write_report(
    declaration: Declaration,
    store: Store,
    results: Sequence[TrialResult] | None = None,
    compared: Sequence[TrialResult] | None = None,
    audit: Audit | None = None,
    *,
    conclusions: Sequence[str] = (),
    tables: Sequence[Table] = (),
    ending: str = "",
) -> Written:
    """Write summary.md, tables/accuracy.csv, audit.json and trials.parquet; what of the
    rest is there already is not read again.

    The summary begins with `conclusions`, holds `tables` below that of accuracies, and ends with `ending`.
    """
    results = sweep_results(declaration, store) if results is None else results
    audit = audit_sweep(declaration, store) if audit is None else audit
    compared = on_common_pairs(results) if compared is None else compared
    rows = table_rows(compared)
    folder = store.local_sweep_dir(declaration.sweep) / "report"
    summary = "\n".join(
        [
            *(f"# {declaration.sweep}", ""),
            *(line for sentence in conclusions for line in (sentence, "")),
            *_results_section(results, compared, rows, tables),
            *_audit_section(audit, compared),
        ]
    )
    replace(folder / "summary.md", f"{summary}\n{ending}")
    replace(folder / "tables" / "accuracy.csv", accuracy_csv(rows))
    if audit.sets:
        replace(folder / "audit.json", json.dumps(audit.as_json(), indent=1, ensure_ascii=False) + "\n")
    trials = store.local_sweep_dir(declaration.sweep) / "trials.parquet"
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(trial_rows(results)), sink)
    # Two drivers that end at once both write it.
    replace_bytes(trials, sink.getvalue().to_pybytes())
    for written in (folder, trials):
        store.share(written)
    return Written(folder=folder, rows=rows, results=results, compared=compared)


def _results_section(
    results: Sequence[TrialResult],
    compared: Sequence[TrialResult],
    rows: Sequence[AccuracyRow],
    tables: Sequence[Table],
) -> Iterator[str]:
    """Accuracy by category, more tables, and what is missing."""
    complete = sum(result.complete for result in results)
    yield f"{complete} of {len(results)} trials complete. Accuracy by category: mean over a category's sets, then"
    yield "mean ± standard deviation over seeds; EX−IM is over the seeds and models that have both."
    yield from ("", accuracy_table(rows).markdown())
    if left_out := left_out_lines(results, compared):
        yield from ("", *(f"- {line}" for line in left_out))
    for table in tables:
        yield from ("", f"{table.title}. {table.note}", "", table.markdown())
    if by_epoch := epoch_table(compared):
        yield from ("", "Accuracy after each epoch, mean over seeds:", "", by_epoch.markdown())
    unlearned = [result.record.name for result in results if result.trained and not result.learned]
    if unlearned:
        yield from ("", "Not learned (training accuracy at chance; in no mean):", "")
        yield from (f"- {name}" for name in unlearned)
    holes = [result.record.name for result in results if not result.complete]
    if holes:
        yield from ("", "Missing:", "", *(f"- {name}" for name in holes))


def _audit_section(audit: Audit, results: Sequence[TrialResult]) -> Iterator[str]:
    tables = {table.name: table for table in audit_tables(audit, results)}
    if controlled := tables.get("controlled"):
        yield from ("", f"## {controlled.title}", "", controlled.note, "", controlled.markdown())
    if audit.sets:
        findings = tables.get("audit_findings")
        yield from ("", "## Audit of the data", "", tables["audit_sets"].markdown())
        yield from ("", findings.markdown() if findings else "No findings.")
