"""The tables of a report and summary.md: accuracy by category, by epoch, and without the help of length and leaks.

A trial whose training accuracy is at chance is shown as not learned and enters no mean.
"""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from orchestrator.report import published
from orchestrator.report.audit import audit_sweep
from orchestrator.report.comparison import CONTROLS, MODELS_NEEDED, Analysis, Mean, Scope, has, over_sets
from orchestrator.report.power import power_table
from orchestrator.report.results import (
    TrialResult,
    TrialState,
    left_out_lines,
    on_common_pairs,
    sweep_results,
    trial_rows,
)
from orchestrator.report.scaling import scaling_table
from orchestrator.report.statistics import LEVEL, half_width
from orchestrator.report.tables import MEAN, Table, Value, mean_label, reward_title, table_of
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration
from trainers.data.audit import FINDINGS, SETS, Audit, set_row
from trainers.storage import replace, replace_bytes

NOT_LEARNED, AT_CHANCE = "not learned", "at chance"
# Epochs that a terminal has room for.
EPOCHS_SHOWN = 8
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "loss": "Loss, mean of −ln σ(r⁺ − r⁻)",
    "abs_margin": "Absolute margin, mean |r⁺ − r⁻| over the rewards' standard deviation",
}


def accuracies(analysis: Analysis) -> list[dict[str, Value]]:
    """Return accuracy by training set, category and model as numbers and as text; the last row of a category is its mean.

    A model without a score in a category has no row there.
    """
    rows: list[dict[str, Value]] = []
    kinds = analysis.rewards
    for scope in analysis.categories():
        lines = [line for model in analysis.models if (line := _of_model(analysis, scope, model, kinds))]
        found = {kind: analysis.mean_of_models(scope, kind, "accuracy") for kind in kinds}
        means = {kind: mean for kind, mean in found.items() if mean}
        if len(lines) > 1 and means:
            counts = {kind: len(mean.models) for kind, mean in means.items()}
            last: dict[str, Value] = {"model": mean_label(counts)}
            for kind, mean in means.items():
                last |= {kind: f"{mean.value:.3f}", f"{kind}_mean": mean.value}
            lines.append(last | _gaps(analysis, scope, None, counts, "model"))
        rows += [{**_place(scope), **line} for line in lines]
    return rows


def _of_model(analysis: Analysis, scope: Scope, model: str, kinds: Sequence[str]) -> dict[str, Value] | None:
    """Return a model's row: the mean of each reward type, and how many trials are not in it."""
    line: dict[str, Value] = {"model": model}
    counts = {}
    for kind in kinds:
        asked = [
            item
            for item in analysis.results
            if (item.record.train_set, item.record.model, item.record.reward)
            == (scope.train_set, model, kind)
            and any(wanted.category == scope.category for wanted in item.record.evaluations)
        ]
        known = [item for item in asked if has(item, scope)]
        mean, missing = analysis.mean(scope, model, kind, "accuracy"), len(asked) - len(known)
        not_learned = [over_sets(item, scope) for item in known if not item.learned]
        counts[kind] = mean.seeds if mean else 0
        if mean:
            line |= {f"{kind}_mean": mean.value, f"{kind}_std": mean.std}
        if mean or not_learned:
            line[kind] = _text(mean, not_learned, missing)
        numbers = (counts[kind], len(not_learned), missing)
        line |= zip((f"{kind}_seeds", f"{kind}_not_learned", f"{kind}_missing"), numbers, strict=True)
    if not any(kind in line for kind in kinds):
        return None
    return line | _gaps(analysis, scope, [model], counts, "seed")


def _text(mean: Mean | None, not_learned: Sequence[float], missing: int) -> str:
    """Write a reward type's mean, how many trials did not learn (with their accuracy if none did), and how many are missing."""
    if mean is None:
        text = f"{statistics.fmean(not_learned):.3f} {NOT_LEARNED}"
    else:
        text = f"{mean.value:.3f}" + ("" if mean.std is None else f" ± {mean.std:.3f}")
        text += f", {AT_CHANCE}" if mean.at_chance else ""
        text += f", {len(not_learned)} {NOT_LEARNED}" if not_learned else ""
    return f"{text}, {missing} missing" if missing else text


def _gaps(
    analysis: Analysis, scope: Scope, models: list[str] | None, counts: Mapping[str, int], unit: str
) -> dict[str, Value]:
    """Return each difference, with its number of seeds or models if a mean beside it is over more."""
    line: dict[str, Value] = {}
    for other in analysis.others:
        name, gap = (
            f"{analysis.baseline}_minus_{other}",
            analysis.difference(scope, "accuracy", models, other=other),
        )
        over = 0 if gap is None else len(gap.models) if unit == "model" else gap.seeds
        line[f"{name}_{unit}s"] = over
        if gap is not None:
            text = f"{gap.value:+.3f}"
            if any(counts.get(kind) != over for kind in (analysis.baseline, other)):
                text += f" over {over} {unit}{'s' if over > 1 else ''}"
            line |= {f"difference_{other}": text, name: gap.value}
    return line


def accuracy_table(analysis: Analysis) -> Table:
    titles = {f"difference_{other}": analysis.title(other) for other in analysis.others}
    columns = " ".join(("train_set category model", *analysis.rewards, *titles))
    rows = accuracies(analysis)
    return Table(name="accuracy", title="accuracy by category", columns=columns, rows=rows, titles=titles)


def accuracy_numbers(analysis: Analysis) -> Table:
    parts = ("mean", "std", "seeds", "not_learned", "missing")
    names = [f"{kind}_{part}" for kind in analysis.rewards for part in parts]
    gaps = [
        f"{analysis.baseline}_minus_{other}{end}"
        for other in analysis.others
        for end in ("", "_seeds", "_models")
    ]
    columns = " ".join(("train_set category model", *names, *gaps))
    return Table(name="accuracy", title="", columns=columns, rows=accuracies(analysis))


def epoch_table(results: Sequence[TrialResult], most: int | None = None) -> Table | None:
    """Return accuracy after each epoch, if trials are evaluated after several epochs; else None.

    Trials that did not learn by their last epoch are left out. At most `most` epochs are shown, evenly spaced.
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
    if analysis.others:
        yield differences(analysis)
        yield power_table(analysis)
        yield win_rates(analysis)
    for metric in METRIC_TITLES:
        yield by_category(analysis, metric)
    yield by_set(analysis)
    if (scaling := scaling_table(analysis)).rows:
        yield scaling
    if any(item.scores.suite for result in analysis.results for item in result.final):
        yield suites(analysis)
    yield calibrations(analysis)


def _place(scope: Scope) -> dict[str, Value]:
    return {"train_set": scope.train_set, "category": scope.category}


def _lines(analysis: Analysis, scope: Scope, metric: str) -> Iterator[tuple[str, dict[str, Mean]]]:
    """Yield a metric's means by reward type: for each model that has some, then over the complete models."""
    for label in (*analysis.models, None):
        models = [label] if label else None
        found = {kind: analysis.mean_of_models(scope, kind, metric, models) for kind in analysis.rewards}
        if means := {kind: mean for kind, mean in found.items() if mean}:
            yield label or mean_label({kind: len(mean.models) for kind, mean in means.items()}), means


def _estimates(found: Mapping[str, Mean | None]) -> dict[str, Value]:
    return {name: item.estimate if item else None for name, item in found.items()}


def by_category(analysis: Analysis, metric: str) -> Table:
    """Return a metric by category and model, beside the paper's mean if the sets correspond."""
    rows: list[dict[str, Value]] = []
    for scope in analysis.categories():
        for label, means in _lines(analysis, scope, metric):
            theirs = {
                f"{kind}_paper": published.number(scope.train_set, scope.sets, kind, metric)
                for kind in analysis.rewards
                if label not in analysis.models
            }
            rows.append({**_place(scope), "model": label, **_estimates(means), **theirs})
    quoted = [kind for kind in analysis.rewards if any(row.get(f"{kind}_paper") is not None for row in rows)]
    note = (
        "Each: mean over the scope's sets, then over seeds ± standard deviation over seeds, "
        f"[{LEVEL:.0%} interval over seeds and test pairs; of a mean of {MODELS_NEEDED} models or more, over models too]. "
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
    rows: list[dict[str, Value]] = []
    choices: list[list[str] | None] = [*([model] for model in analysis.models), None]
    for scope, other, models in itertools.product(analysis.categories(), analysis.others, choices):
        found = analysis.difference(scope, "accuracy", models, other=other)
        if found is None:
            continue
        others = {
            metric: analysis.difference(scope, metric, models, other=other)
            for metric in ("loss", "abs_margin")
        }
        rows.append(
            {
                **_place(scope),
                "difference": analysis.title(other),
                "model": models[0] if models else f"{MEAN} of {len(found.models)}",
                "accuracy": found.estimate,
                "over": found.over,
                "p": found.estimate.p,
                "p_holm": None if models else analysis.holm.get((scope, other)),
                "p_pairs": found.p_pairs,
                **_estimates(others),
            }
        )
    return Table(
        name="differences",
        title="Differences, paired by model, seed and pair",
        note=f"Above 0 in accuracy: {reward_title(analysis.baseline)} ranks more pairs right. p: of no difference, by the same "
        "Student-t as the interval; – if there is one training of each type. Holm: p of the means, corrected for their number "
        "(from p (pairs) if there is no other). p (pairs): sign-flip permutation test over test pairs, for these trainings.",
        columns="train_set category difference model accuracy over p p_holm p_pairs loss abs_margin",
        titles={
            "over": "interval and p over",
            "p_holm": "p, Holm",
            "p_pairs": "p (pairs)",
        },
        rows=rows,
        forms={**dict.fromkeys(METRIC_TITLES, "+.3f"), **dict.fromkeys(("p", "p_holm", "p_pairs"), ".2g")},
    )


def win_rates(analysis: Analysis) -> Table:
    scopes = (*analysis.categories(), *analysis.single_sets())
    return Table(
        name="win_rates",
        title=f"Win-rate of {reward_title(analysis.baseline)}",
        note="Cells of model, seed and evaluation set; within one point of accuracy is a tie.",
        columns="train_set category evaluation_set other cells ahead ties behind share",
        titles={"other": "over", "share": "share ahead"},
        rows=[
            {
                **_place(scope),
                "evaluation_set": scope.dataset or "all",
                "other": reward_title(other),
                **{name: getattr(found, name) for name in ("cells", "ahead", "ties", "behind", "share")},
            }
            for scope, other in itertools.product(scopes, analysis.others)
            if (found := analysis.win_rate(scope, other)).cells
        ],
        forms={"share": ".0%"},
    )


def by_set(analysis: Analysis) -> Table:
    """Return for every evaluation set all accuracies, loss and margin, by reward type."""
    rows: list[dict[str, Value]] = []
    for scope, model, kind in itertools.product(analysis.single_sets(), analysis.models, analysis.rewards):
        means = {name: analysis.mean(scope, model, kind, name) for name in METRIC_TITLES}
        controls = {name: analysis.mean(scope, model, kind, name) for name in CONTROLS}
        if accuracy := means["accuracy"]:
            rows.append(
                {
                    **_place(scope),
                    "evaluation_set": scope.dataset,
                    "model": model,
                    "reward": reward_title(kind),
                    **_estimates(means),
                    **{name: found.value if found else None for name, found in controls.items()},
                    "seeds": accuracy.seeds,
                    "pairs": accuracy.pairs,
                    "half_width": f"± {half_width(accuracy.prompts):.2f}",
                }
            )
    return Table(
        name="sets",
        title="Every evaluation set",
        note="Length-controlled: matched strata of the length difference; leak-free: pairs that the training split does "
        "not hold (docs/audit.md); – if it was not measured. The last column: half of the 95 % interval at an accuracy of 0.75 "
        "from the number of pairs alone.",
        columns=f"train_set category evaluation_set model reward accuracy {' '.join(CONTROLS)} loss abs_margin seeds pairs half_width",
        titles={"half_width": "± by pairs"},
        rows=rows,
    )


def suites(analysis: Analysis) -> Table:
    """Return each suite's own numbers: its score and its parts, or its subsets if it has no other parts."""
    rows: list[dict[str, Value]] = []
    for scope in analysis.single_sets():
        scored = (item for trial in analysis.results for item in trial.final if item.dataset == scope.dataset)
        names = [*dict.fromkeys(name for item in scored for name in item.scores.suite)]
        names = [name for name in names if name not in ("suite/items", "suite/left_out")]
        parts = [name for name in names if not name.startswith("suite/subset/")]
        for name in parts if len(parts) > 1 else names:
            for label, means in _lines(analysis, scope, name):
                counted = {
                    f"{over_sets(trial, scope, 'suite/items'):.0f}"
                    for mean in means.values()
                    for seeds in mean.cells.values()
                    for (trial,) in seeds.values()
                }
                rows.append(
                    {
                        "train_set": scope.train_set,
                        "suite": scope.dataset,
                        "number": name.removeprefix("suite/"),
                        "model": label,
                        **{kind: mean.value for kind, mean in means.items()},
                        "prompts": " / ".join(sorted(counted, key=int)),
                    }
                )
    return Table(
        name="suites",
        title="Suites by their own numbers",
        note="Means over seeds, then models; a tie is no success. A prompt counts if all of its answers are within the length "
        "limits, so models may be scored on different prompts: then there are several numbers. Every number: docs/suites.md.",
        columns=f"train_set suite number model {' '.join(analysis.rewards)} prompts",
        rows=rows,
    )


def calibrations(analysis: Analysis) -> Table:
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


def without_length_and_leaks(analysis: Analysis) -> Table:
    """Return the accuracies that neither length nor leaks can help, of every evaluation set and reward type."""
    columns = ("accuracy", *CONTROLS, "n", "n_leak_free", "longer_wins")
    rows: list[dict[str, Value]] = []
    for scope, kind in itertools.product(analysis.single_sets(), analysis.rewards):
        found = {name: analysis.mean_of_models(scope, kind, name) for name in columns}
        if accuracy := found["accuracy"]:
            values = {name: mean.value if mean else None for name, mean in found.items()}
            place = {
                "train_set": scope.train_set,
                "evaluation_set": scope.dataset,
                "reward": reward_title(kind),
            }
            rows.append({**place, **values, "trainings": accuracy.runs})
    return Table(
        name="controlled",
        title="Accuracy without length and leaks",
        note="Means over seeds, then models. Length-controlled: matched strata of the length difference; leak-free: "
        "pairs that the training split does not hold; longer wins: the accuracy of length alone, in tokens. "
        "See docs/audit.md.",
        columns=f"train_set evaluation_set reward {' '.join(columns)} trainings",
        titles={"n": "pairs", "n_leak_free": "leak-free pairs"},
        rows=rows,
        forms={"n": ".0f", "n_leak_free": ".0f"},
    )


def audit_tables(audit: Audit, analysis: Analysis) -> list[Table]:
    """Return accuracy without length and leaks, the audited sets, and the findings; without empty tables."""
    found = (
        without_length_and_leaks(analysis),
        table_of(
            SETS,
            [*map(set_row, audit.sets)],
            name="audit_sets",
            title="Sets",
            note="Lengths in characters and words.",
        ),
        table_of(
            FINDINGS,
            audit.findings,
            name="audit_findings",
            title="Findings",
            note="The worst first.",
        ),
    )
    return [item for item in found if item.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a terminal shows of a report; stored with the report, so that showing it again computes nothing.

    `tables` are the accuracies and, with several epochs, the accuracies after each; `accuracies` are the same numbers for
    programs; `more` are the tables below them in summary.md; `left_out` names the pairs over the length limits.
    """

    tables: tuple[Table, ...] = ()
    more: tuple[Table, ...] = ()
    accuracies: Sequence[dict[str, Any]] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def of_json(cls, loaded: dict[str, Any]) -> "Shown":
        return cls(
            tables=tuple(map(Table.of_json, loaded["tables"])),
            more=tuple(map(Table.of_json, loaded["more"])),
            accuracies=loaded["accuracies"],
            left_out=tuple(loaded["left_out"]),
        )


class Written(NamedTuple):
    """A report's folder, its trials, and what a terminal shows of it."""

    folder: Path
    results: Sequence[TrialState]
    shown: Shown

    @property
    def complete(self) -> bool:
        return all(result.complete for result in self.results)


def write_report(
    declaration: Declaration,
    store: Store,
    results: Sequence[TrialResult] | None = None,
    analysis: Analysis | None = None,
    audit: Audit | None = None,
    *,
    conclusions: Sequence[str] = (),
    tables: Sequence[Table] = (),
    ending: str = "",
) -> Written:
    """Write summary.md, tables/accuracy.csv, audit.json and trials.parquet.

    The summary begins with `conclusions`, holds `tables` below that of accuracies, and ends with `ending`.
    """
    results = sweep_results(declaration, store) if results is None else results
    audit = audit_sweep(declaration, store) if audit is None else audit
    analysis = Analysis(on_common_pairs(results)) if analysis is None else analysis
    folder = store.local_sweep_dir(declaration.sweep) / "report"
    summary = "\n".join(
        [
            *(f"# {declaration.sweep}", ""),
            *(line for sentence in conclusions for line in (sentence, "")),
            *_results_section(results, analysis, tables),
            *_audit_section(audit, analysis),
        ]
    )
    replace(folder / "summary.md", f"{summary}\n{ending}")
    replace(folder / "tables" / "accuracy.csv", accuracy_numbers(analysis).csv())
    if audit.sets:
        replace(folder / "audit.json", json.dumps(audit.as_json(), indent=1, ensure_ascii=False) + "\n")
    trials = store.local_sweep_dir(declaration.sweep) / "trials.parquet"
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(trial_rows(results)), sink)
    # Two drivers that end at the same time both write it.
    replace_bytes(trials, sink.getvalue().to_pybytes())
    for written in (folder, trials):
        store.share(written)
    by_epoch = epoch_table(analysis.results, most=EPOCHS_SHOWN)
    shown = Shown(
        tables=(accuracy_table(analysis), *([by_epoch] if by_epoch else [])),
        more=tuple(tables),
        accuracies=accuracy_numbers(analysis).records(),
        left_out=tuple(left_out_lines(results, analysis.results)),
    )
    return Written(folder=folder, results=results, shown=shown)


def _results_section(
    results: Sequence[TrialResult], analysis: Analysis, tables: Sequence[Table]
) -> Iterator[str]:
    """Yield the lines about accuracy by category, further tables, and what is missing."""
    complete = sum(result.complete for result in results)
    yield f"{complete} of {len(results)} trials complete. Accuracy by category: mean over a category's sets, then"
    yield "mean ± standard deviation over seeds; a difference is over the seeds and models that have both types."
    yield from ("", accuracy_table(analysis).markdown())
    if left_out := left_out_lines(results, analysis.results):
        yield from ("", *(f"- {line}" for line in left_out))
    for table in tables:
        yield from ("", f"{table.title}. {table.note}", "", table.markdown())
    if by_epoch := epoch_table(analysis.results):
        yield from ("", "Accuracy after each epoch, mean over seeds:", "", by_epoch.markdown())
    unlearned = [result.record.name for result in results if result.trained and not result.learned]
    if unlearned:
        yield from ("", "Not learned (at chance on their own training pairs; in no mean):", "")
        yield from (f"- {name}" for name in unlearned)
    holes = [result.record.name for result in results if not result.complete]
    if holes:
        yield from ("", "Missing:", "", *(f"- {name}" for name in holes))


def _audit_section(audit: Audit, analysis: Analysis) -> Iterator[str]:
    tables = {table.name: table for table in audit_tables(audit, analysis)}
    if controlled := tables.get("controlled"):
        yield from ("", f"## {controlled.title}", "", controlled.note, "", controlled.markdown())
    if audit.sets:
        findings = tables.get("audit_findings")
        yield from ("", "## Audit of the data", "", tables["audit_sets"].markdown())
        yield from ("", findings.markdown() if findings else "No findings.")
