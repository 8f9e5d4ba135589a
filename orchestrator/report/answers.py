"""The report's statistics as tables."""

from collections.abc import Iterator

from orchestrator.report import published
from orchestrator.report.comparison import Analysis, Difference, Mean
from orchestrator.report.scopes import Scope
from orchestrator.report.statistics import LEVEL, Estimate, half_width
from orchestrator.report.summary import MEAN, mean_label, reward_title
from orchestrator.report.tables import Column, Table, Value, columns

_INTERVAL = (
    f"mean over the scope's sets, then over seeds ± standard deviation over seeds, [{LEVEL:.0%} interval: "
    "bootstrap over test pairs and seeds]"
)
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "loss": "Loss, mean of −ln σ(r⁺ − r⁻)",
    "abs_margin": "Absolute margin, mean |r⁺ − r⁻| over the rewards' standard deviation",
}
SIDE_METRICS = (("accuracy_length_controlled", "length-controlled"), ("accuracy_leak_free", "leak-free"))
_PLACE = columns(("train_set", "trained on"), ("category", "category"), ("model", "model"))


def statistics_tables(analysis: Analysis) -> Iterator[Table]:
    """Every table of statistics, the answer first."""
    if analysis.both:
        yield differences(analysis)
        yield win_rates(analysis)
    for metric in METRIC_TITLES:
        yield by_category(analysis, metric)
    yield by_set(analysis)
    yield calibrations(analysis)


def by_category(analysis: Analysis, metric: str) -> Table:
    """A metric by category and model, and the paper's mean beside ours where the sets correspond."""
    titles = [Column(name=kind, title=reward_title(kind)) for kind in analysis.rewards]
    quoted = [
        (kind, Column(name=f"{kind}_paper", title=f"{reward_title(kind)}, the paper [S]"))
        for kind in analysis.rewards
        if any(_paper(scope, kind, metric) is not None for scope in analysis.categories())
    ]
    rows: list[tuple[Value, ...]] = []
    for scope in analysis.categories():
        for model in analysis.models:
            means = [analysis.mean(scope, model, kind, metric) for kind in analysis.rewards]
            if any(means):
                place = (scope.train_set, scope.category, model)
                rows.append((*place, *map(_shown, means), *(None for _ in quoted)))
        over = [analysis.mean_of_models(scope, kind, metric) for kind in analysis.rewards]
        if any(over):
            models = {
                kind: len(mean.models) for kind, mean in zip(analysis.rewards, over, strict=True) if mean
            }
            theirs = [_paper(scope, kind, metric) for kind, _ in quoted]
            place = (scope.train_set, scope.category, mean_label(models))
            rows.append((*place, *map(_shown, over), *theirs))
    note = f"Each: {_INTERVAL}. {MEAN.capitalize()} of n: the models that have every reward type."
    if quoted:
        note += f" {published.SOURCE}: a second-hand summary; the mean of six models of 1B to 8B, on sets of these names."
    return Table(
        name=f"{metric}_by_category",
        title=f"{METRIC_TITLES[metric]}, by category",
        note=note,
        columns=(*_PLACE, *titles, *(column for _, column in quoted)),
        rows=tuple(rows),
    )


def _shown(found: Mean | Difference | None) -> Estimate | None:
    return None if found is None else found.estimate


def _paper(scope: Scope, reward: str, metric: str) -> float | None:
    return published.number(scope.train_set, scope.sets, reward, metric)


def differences(analysis: Analysis) -> Table:
    """EX−IM by category and model."""
    rows: list[tuple[Value, ...]] = []
    for scope in analysis.categories():
        choices: list[tuple[str, list[str] | None]] = [(model, [model]) for model in analysis.models]
        for label, models in (*choices, ("", None)):
            found = analysis.difference(scope, "accuracy", models)
            if found is None:
                continue
            others = [analysis.difference(scope, metric, models) for metric in ("loss", "abs_margin")]
            rows.append(
                (
                    scope.train_set,
                    scope.category,
                    label or f"{MEAN} of {len(found.models)}",
                    found.estimate,
                    found.p_pairs,
                    found.p_runs,
                    found.runs,
                    found.pairs,
                    *map(_shown, others),
                )
            )
    return Table(
        name="differences",
        title="EX−IM, paired by model, seed and pair",
        note="Above 0 in accuracy: EX-RM ranks more pairs right. p (pairs): signs flipped test pair by test pair, "
        "would other pairs say the same; p (trainings): flipped training by training, would other seeds and models; "
        "n trainings cannot give less than 2/2ⁿ. Not corrected for the number of rows.",
        columns=(
            *_PLACE,
            *columns(
                ("accuracy", "accuracy", "+.3f"),
                ("p_pairs", "p (pairs)", ".4f"),
                ("p_trainings", "p (trainings)", ".4f"),
                ("trainings", "trainings of each type"),
                ("pairs", "pairs a set"),
                ("loss", "loss", "+.3f"),
                ("abs_margin", "absolute margin", "+.3f"),
            ),
        ),
        rows=tuple(rows),
    )


def win_rates(analysis: Analysis) -> Table:
    """Which type is ahead in how many cells."""
    rows: list[tuple[Value, ...]] = []
    for scope in (*analysis.categories(), *analysis.single_sets()):
        found = analysis.win_rate(scope)
        if found.cells:
            place = (scope.train_set, scope.category, scope.dataset or "all")
            rows.append((*place, found.cells, found.ahead, found.ties, found.behind, found.share))
    return Table(
        name="win_rates",
        title="Win-rate of EX-RM over IM-RM",
        note="Cells of model, seed and evaluation set; within one point of accuracy is a tie.",
        columns=columns(
            ("train_set", "trained on"),
            ("category", "category"),
            ("evaluation_set", "set"),
            ("cells", "cells"),
            ("ex_rm_ahead", "EX-RM ahead"),
            ("ties", "ties"),
            ("im_rm_ahead", "IM-RM ahead"),
            ("share", "share ahead", ".0%"),
        ),
        rows=tuple(rows),
    )


def by_set(analysis: Analysis) -> Table:
    """Every evaluation set: accuracies of all kinds, loss and margin, by reward type."""
    rows: list[tuple[Value, ...]] = []
    for scope in analysis.single_sets():
        for model in analysis.models:
            for kind in analysis.rewards:
                means = {name: analysis.mean(scope, model, kind, name) for name in METRIC_TITLES}
                accuracy = means["accuracy"]
                if accuracy is None:
                    continue
                sides = [analysis.side_metric(scope, model, kind, name) for name, _ in SIDE_METRICS]
                rows.append(
                    (
                        scope.train_set,
                        scope.category,
                        scope.dataset,
                        model,
                        reward_title(kind),
                        accuracy.estimate,
                        *sides,
                        *(_shown(means[name]) for name in ("loss", "abs_margin")),
                        accuracy.seeds,
                        accuracy.pairs,
                        f"± {half_width(accuracy.pairs):.2f}",
                    )
                )
    return Table(
        name="sets",
        title="Every evaluation set",
        note="Length-controlled: matched strata of the length difference; leak-free: pairs that the training split does "
        "not hold (docs/audit.md); – where it was not measured. The last column: what the number of pairs alone leaves open at "
        "an accuracy of 0.75.",
        columns=columns(
            ("train_set", "trained on"),
            ("category", "category"),
            ("evaluation_set", "set"),
            ("model", "model"),
            ("reward", "reward"),
            ("accuracy", "accuracy"),
            *SIDE_METRICS,
            ("loss", "loss"),
            ("abs_margin", "absolute margin"),
            ("seeds", "seeds"),
            ("pairs", "pairs"),
            ("half_width", "± by pairs"),
        ),
        rows=tuple(rows),
    )


def calibrations(analysis: Analysis) -> Table:
    """Expected calibration error and Brier score, by category and reward type."""
    rows: list[tuple[Value, ...]] = []
    for scope in (*analysis.categories(), *analysis.single_sets()):
        for kind in analysis.rewards:
            found = analysis.calibration(scope, kind)
            if found is not None:
                place = (scope.train_set, scope.category, scope.dataset or "all", reward_title(kind))
                rows.append((*place, found.expected_error, found.brier, found.pairs))
    return Table(
        name="calibration",
        title="Calibration of σ(margin)",
        note="Over the pairs of all models and seeds. ECE: |accuracy − confidence| over ten bins of equally many "
        "pairs. Brier: mean (1 − σ(r⁺ − r⁻))², 0.25 for a coin.",
        columns=columns(
            ("train_set", "trained on"),
            ("category", "category"),
            ("evaluation_set", "set"),
            ("reward", "reward"),
            ("ece", "ECE"),
            ("brier", "Brier"),
            ("scores", "scores"),
        ),
        rows=tuple(rows),
    )
