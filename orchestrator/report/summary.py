"""The tables of a report's statistics, and what a terminal shows of a report.

A trial whose training accuracy is at chance is shown as not learned and enters no mean.
"""

import itertools
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orchestrator.report import published
from orchestrator.report.comparison import CONTROLS, MODELS_NEEDED, Analysis, Mean, Scope, has, over_sets
from orchestrator.report.power import power_table
from orchestrator.report.results import TrialResult, TrialState, by_seeds, on_common_pairs
from orchestrator.report.scaling import scaling_table
from orchestrator.report.statistics import LEVEL
from orchestrator.report.tables import MEAN, Table, Value, mean_label, number_of, reward_title
from trainers.data.audit import FINDINGS, SETS, Audit, set_row
from trainers.evaluate import metrics
from trainers.specs import clean_name

METRIC_TITLES = {
    "accuracy": "Accuracy",
    "loss": "Loss, mean of −ln σ(r⁺ − r⁻)",
    "abs_margin": "Absolute margin, mean |r⁺ − r⁻| over the rewards' standard deviation",
}
# Columns of an ensemble.
_ENSEMBLE = {
    "accuracy": "accuracy of the mean",
    "accuracy_alone": "of a seed alone",
    "accuracy_spread": "± over seeds",
    "margin_spread": "spread of margins",
}


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
    if (found := suites(analysis)).rows:
        yield found
    yield calibrations(analysis)


def _place(scope: Scope) -> dict[str, Value]:
    return {"train_set": scope.train_set, "category": scope.category}


def _lines(
    analysis: Analysis, scope: Scope, metric: str
) -> Iterator[tuple[str, list[str] | None, dict[str, Mean]]]:
    """Yield label, models and a metric's means by reward type: of each model with results, then of several complete models."""
    known = [
        model for model in analysis.models if any(has(item, scope) for item in analysis.of(scope, model))
    ]
    for model in known:
        yield model, [model], _means(analysis, scope, metric, [model])
    if len(known) > 1 and (means := _means(analysis, scope, metric, None)):
        yield mean_label({kind: len(mean.models) for kind, mean in means.items()}), None, means


def _means(analysis: Analysis, scope: Scope, metric: str, models: list[str] | None) -> dict[str, Mean]:
    found = {kind: analysis.mean(scope, kind, metric, models) for kind in analysis.rewards}
    return {kind: mean for kind, mean in found.items() if mean}


def _estimates(found: Mapping[str, Mean | None]) -> dict[str, Value]:
    return {name: item.estimate if item else None for name, item in found.items()}


def by_category(analysis: Analysis, metric: str) -> Table:
    """Return a metric by category and model, and the paper's mean if the sets correspond; accuracies have differences, too."""
    others = analysis.others if metric == "accuracy" else ()
    gap_titles = {f"{analysis.baseline}_minus_{other}": analysis.title(other) for other in others}
    rows: list[dict[str, Value]] = []
    for scope in analysis.categories():
        lines = list(_lines(analysis, scope, metric))
        for label, models, means in lines:
            rows.append({**_place(scope), "model": label, **_estimates(means)})
            if metric == "accuracy":
                gaps = [analysis.difference(scope, metric, models, other=other) for other in analysis.others]
                rows[-1] |= _estimates(dict(zip(gap_titles, gaps, strict=True)))
                rows[-1]["remarks"] = "; ".join(_remarks(analysis, scope, models, means, gaps)) or None
        if lines:
            # In the line of the mean, if there is one.
            quoted = {
                kind: published.number(scope.train_set, scope.sets, kind, metric) for kind in analysis.rewards
            }
            rows[-1] |= {f"{kind}_paper": value for kind, value in quoted.items()}
    papers = [f"{kind}_paper" for kind in analysis.rewards]
    asked = [name for name in (*papers, "remarks") if any(row.get(name) is not None for row in rows)]
    note = (
        "Each: mean over the scope's sets, then over seeds ± standard deviation over seeds, "
        f"[{LEVEL:.0%} interval over seeds and test pairs; of a mean of {MODELS_NEEDED} models or more, over models too]. "
        f"{MEAN.capitalize()} of n: the models that have every reward type."
    )
    if not set(papers).isdisjoint(asked):
        note += f" {published.SOURCE}: a second-hand summary; the mean of six models of 1B to 8B, on sets of these names."
    return Table(
        name=f"{metric}_by_category",
        title=f"{METRIC_TITLES[metric]}, by category",
        note=note,
        columns=" ".join(("train_set category model", *analysis.rewards, *gap_titles, *asked)),
        titles={f"{kind}_paper": f"{reward_title(kind)}, the paper [S]" for kind in analysis.rewards}
        | gap_titles,
        rows=rows,
        forms=dict.fromkeys(gap_titles, "+.3f"),
    )


def _remarks(
    analysis: Analysis,
    scope: Scope,
    models: list[str] | None,
    means: Mapping[str, Mean],
    gaps: Sequence[Mean | None],
) -> Iterator[str]:
    """Say which trials are not in a model's means, which means are at chance, and which differences are over fewer."""
    for model, kind in itertools.product(models or (), analysis.rewards):
        asked = [
            item
            for item in analysis.of(scope, model)
            if item.record.reward == kind
            and any(wanted.category == scope.category for wanted in item.record.evaluations)
        ]
        known = [item for item in asked if has(item, scope)]
        if unlearned := [over_sets(item, scope) for item in known if not item.learned]:
            yield f"{reward_title(kind)}: {len(unlearned)} not learned ({statistics.fmean(unlearned):.3f})"
        if missing := len(asked) - len(known):
            yield f"{reward_title(kind)}: {missing} missing"
        if kind in means and means[kind].at_chance:
            yield f"{reward_title(kind)}: at chance"
    for other, gap in zip(analysis.others, gaps, strict=True):
        both = [means[kind] for kind in (analysis.baseline, other) if kind in means]
        over, *others = (mean.seeds if models else len(mean.models) for mean in (gap, *both)) if gap else (0,)
        if any(count != over for count in others):
            yield f"{analysis.title(other)}: over {number_of(over, 'seed' if models else 'model')}"


def accuracy_table(accuracies: Table) -> Table:
    """Return the accuracies by category without their intervals and the paper's numbers, for which a terminal has no room."""
    return replace(
        accuracies,
        title="accuracy by category",
        note="Mean over a category's sets, then mean ± standard deviation over seeds.",
        columns=" ".join(name for name in accuracies.names if not name.endswith("_paper")),
        intervals=False,
    )


def differences(analysis: Analysis, beside: Collection[str] = ("loss", "abs_margin")) -> Table:
    """Return each difference of accuracy, of each model and of their mean, and those of the metrics `beside` it."""
    rows: list[dict[str, Value]] = []
    choices: list[list[str] | None] = [*([model] for model in analysis.models), None]
    for scope, other, models in itertools.product(analysis.categories(), analysis.others, choices):
        found = {name: analysis.control(scope, name, models, other=other) for name in ("accuracy", *beside)}
        if plain := found["accuracy"]:
            rows.append(
                {
                    **_place(scope),
                    "difference": analysis.title(other),
                    "model": models[0] if models else f"{MEAN} of {len(plain.models)}",
                    "over": plain.over,
                    "p": plain.estimate.p,
                    "p_holm": None if models else analysis.holm.get((scope, other)),
                    "p_pairs": plain.p_pairs,
                    **_estimates(found),
                }
            )
    return Table(
        name="differences",
        title="Differences, paired by model, seed and pair",
        note=f"Above 0 in accuracy: {reward_title(analysis.baseline)} ranks more pairs right. p: of no difference, by the same "
        "Student-t as the interval; – if there is one training of each type. Holm: p of the means, corrected for their number "
        "(from p (pairs) if there is no other). p (pairs): sign-flip permutation test over test pairs, for these trainings.",
        columns=f"train_set category difference model accuracy over p p_holm p_pairs {' '.join(beside)}",
        titles={"over": "interval and p over", "p_holm": "p, Holm", "p_pairs": "p (pairs)"},
        rows=rows,
        forms={
            **dict.fromkeys(("accuracy", *beside), "+.3f"),
            **dict.fromkeys(("p", "p_holm", "p_pairs"), ".2g"),
        },
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
    """Return for every evaluation set all accuracies, loss and margin, by reward type: of each model, and of several."""
    plain = (*CONTROLS, "n", "n_leak_free", "longer_wins")
    rows: list[dict[str, Value]] = []
    for scope in analysis.single_sets():
        for label, models, means in _lines(analysis, scope, "accuracy"):
            for kind, accuracy in means.items():
                found = {name: analysis.mean(scope, kind, name, models) for name in (*METRIC_TITLES, *plain)}
                rows.append(
                    {
                        "train_set": scope.train_set,
                        "evaluation_set": scope.dataset,
                        "model": label,
                        "reward": reward_title(kind),
                        "trainings": accuracy.runs,
                        **_estimates({name: found[name] for name in METRIC_TITLES}),
                        # A mean over fewer trainings than are named beside it would be taken for one over all.
                        **{
                            name: mean.value if (mean := found[name]) and mean.runs == accuracy.runs else None
                            for name in plain
                        },
                    }
                )
    return Table(
        name="sets",
        title="Every evaluation set, without length and leaks too",
        note="Length-controlled: matched strata of the length difference; leak-free: pairs that the training split does "
        "not hold; – if it was not measured; longer wins: the accuracy of length alone, in tokens. See docs/audit.md.",
        columns=f"train_set evaluation_set model reward accuracy {' '.join(plain)} trainings loss abs_margin",
        titles={"n": "pairs", "n_leak_free": "leak-free pairs"},
        rows=rows,
        forms={"n": ".0f", "n_leak_free": ".0f"},
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
            for label, _, means in _lines(analysis, scope, name):
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


def ensemble_table(results: Sequence[TrialResult]) -> Table:
    """Return for each evaluation set the accuracy of the seeds' mean reward, beside the accuracy of single seeds.

    Trials that did not learn are left out; a row needs two seeds.
    """
    rows: list[dict[str, Value]] = []
    for trials in by_seeds([item for item in on_common_pairs(results) if item.learned]):
        sets = [{item.dataset: item for item in trial.final} for trial in trials]
        for name in dict.fromkeys(itertools.chain(*sets)):
            scores = [of_seed[name].scores for of_seed in sets if name in of_seed]
            if len(scores) < 2:
                continue
            rewards = ([item.chosen for item in scores], [item.rejected for item in scores])
            together, record = metrics.ensemble(*map(np.stack, rewards)), trials[0].record
            numbers = together.summary
            row: dict[str, Value] = {
                "train_set": record.train_set,
                "evaluation_set": name,
                "model": record.model,
                "reward": reward_title(record.reward),
                "seeds": len(scores),
                "accuracy": metrics.accuracy(together.chosen, together.rejected),
            }
            rows.append({**row, **{key: numbers[key] for key in _ENSEMBLE if key in numbers}})
    return Table(
        name="ensembles",
        title="Ensembles of all seeds",
        note="A seed's rewards enter the mean as they are; the spread of margins is their standard deviation over seeds.",
        columns=" ".join(("train_set evaluation_set model reward seeds", *_ENSEMBLE)),
        titles=_ENSEMBLE,
        rows=sorted(rows, key=lambda row: (str(row["train_set"]), str(row["evaluation_set"]))),
    )


def audit_tables(audit: Audit) -> list[Table]:
    """Return the audited sets and the findings; without empty tables."""
    wanted = (
        ("audit_sets", "Sets", "Lengths in characters and words.", SETS, [*map(set_row, audit.sets)]),
        ("audit_findings", "Findings", "The worst first.", FINDINGS, audit.findings),
    )
    tables = []
    for name, title, note, header, found in wanted:
        titles = {clean_name(text): text for text in header}
        rows = [dict(zip(titles, row, strict=True)) for row in found]
        tables.append(
            Table(name=name, title=title, note=note, columns=" ".join(titles), titles=titles, rows=rows)
        )
    return [table for table in tables if table.rows]


class Written(NamedTuple):
    """A report's folder and trials, and what a terminal shows of it, which is stored with the report.

    `tables` are those of summary.md, that of accuracies first; `left_out` names the pairs over the length limits.
    """

    folder: Path
    results: Sequence[TrialState]
    tables: Sequence[Table] = ()
    left_out: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        return all(result.complete for result in self.results)
