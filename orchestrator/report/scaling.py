"""How accuracies and differences change with the size of models of one family, or of the training set.

The fit is a line over the logarithm of size, with a random intercept for each family (over training-set sizes: for each model),
by restricted maximum likelihood. Intervals are Student's t. The line holds for the sizes that it was fitted to only.

Shapes: N points, G groups.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.report.by_axis import at_value, axes_of, reward_without
from orchestrator.report.comparison import Analysis, Scope
from orchestrator.report.house_style import GREY, legend, line_style, panels
from orchestrator.report.statistics import Estimate, Floats, Spread, unbounded_interval
from orchestrator.report.tables import Table, Value, reward_title
from orchestrator.spec.models import architecture_of
from trainers.specs import ModelSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS_AXIS = "train-pairs"
# No line is fitted through fewer sizes, or over a shorter range.
LEAST_SIZES, LEAST_FACTOR = 3, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line over x with the covariance of its intercept and slope; `between` is the variance of the groups' intercepts.

    `parts` are the covariance's derivatives by the variances of the rest and of the intercepts, and `of_variances` is the
    covariance of these two estimates: they give the degrees of freedom at any x (Satterthwaite), at most `degrees`.
    """

    intercept: float
    slope: float
    covariance: Floats
    degrees: float
    between: float
    parts: Sequence[Floats]
    of_variances: Floats

    def at(self, x: float) -> Estimate:
        """Return the line's value at x with its interval."""
        return self._estimate(self.intercept + self.slope * x, np.array([1.0, x]))

    def rise(self) -> Estimate:
        """Return the slope with its interval and p."""
        return self._estimate(self.slope, np.array([0.0, 1.0]))

    def _estimate(self, value: float, terms: Floats) -> Estimate:
        variance = float(terms @ self.covariance @ terms)
        parts = [terms @ part @ terms for part in self.parts]
        degrees = min(self.degrees, max(1.0, 2 * variance**2 / float(parts @ self.of_variances @ parts)))
        return unbounded_interval(value, Spread(variance=variance, degrees=degrees, trainings=1))


def mixed_line(x_N: Floats, y_N: Floats, groups: Sequence[str]) -> Line | None:
    """Fit y = intercept + group's own + slope · x + rest; None if no group has two sizes, or the rest is 0 or has no degree of freedom."""
    from scipy.optimize import minimize_scalar

    names = list(dict.fromkeys(groups))
    degrees = len(y_N) - len(names) - 1
    terms_N2 = np.stack([np.ones(len(x_N)), x_N], axis=1)
    member_NG = np.array([[group == name for name in names] for group in groups], dtype=float)
    share_NN = member_NG / member_NG.sum(axis=0) @ member_NG.T
    x_within, y_within = x_N - share_NN @ x_N, y_N - share_NN @ y_N
    left = y_within - x_within * (x_within @ y_within / max(x_within @ x_within, 1e-300))
    alone = x_within @ x_within <= 1e-12 * max(1.0, float(x_N @ x_N))
    if degrees < 1 or alone or left @ left <= 1e-18 * max(1.0, float(y_N @ y_N)):
        return None

    def solved(ratio: float) -> tuple[float, Floats, Floats, float]:
        """Return −2 log restricted likelihood, coefficients, their covariance, and the residual variance."""
        spread_NN = np.eye(len(y_N)) + ratio * member_NG @ member_NG.T
        weighed_N2 = np.linalg.solve(spread_NN, terms_N2)
        normal = terms_N2.T @ weighed_N2
        found = np.linalg.solve(normal, weighed_N2.T @ y_N)
        rest_N = y_N - terms_N2 @ found
        variance = float(rest_N @ np.linalg.solve(spread_NN, rest_N)) / (len(y_N) - 2)
        logs = np.linalg.slogdet(spread_NN)[1] + np.linalg.slogdet(normal)[1]
        return (len(y_N) - 2) * np.log(variance) + logs, found, variance * np.linalg.inv(normal), variance

    ratio = 0.0
    if len(names) > 1:
        best = minimize_scalar(lambda log: solved(np.exp(log))[0], bounds=(-12.0, 12.0), method="bounded")
        ratio = float(np.exp(best.x)) if best.fun < solved(0.0)[0] else 0.0
    _, found, covariance, variance = solved(ratio)
    # The covariance of y is a sum of these, times the variances of the rest and of the intercepts.
    kinds = [np.eye(len(y_N)), member_NG @ member_NG.T][: min(2, len(names))]
    inverse_NN = np.linalg.inv(np.eye(len(y_N)) + ratio * member_NG @ member_NG.T) / variance
    weights_2N = covariance @ terms_N2.T @ inverse_NN
    rest_NN = inverse_NN - inverse_NN @ terms_N2 @ weights_2N
    information = [[np.trace(rest_NN @ one @ rest_NN @ other) / 2 for other in kinds] for one in kinds]
    return Line(
        intercept=float(found[0]),
        slope=float(found[1]),
        covariance=covariance,
        degrees=float(degrees),
        between=ratio * variance,
        parts=[weights_2N @ kind @ weights_2N.T for kind in kinds],
        of_variances=np.linalg.pinv(information),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Values of an accuracy or a difference at several sizes, and the line through them over log₂ of size."""

    over: str
    scope: Scope
    what: str
    # Of an accuracy; "" for a difference.
    reward: str
    sizes: tuple[float, ...]
    groups: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def too_short(self) -> str:
        """Why the range is too short for a line; "" if it is not."""
        different, factor = len(set(self.sizes)), max(self.sizes) / min(self.sizes)
        if different >= LEAST_SIZES and factor >= LEAST_FACTOR:
            return ""
        return (
            f"too short to say anything: {different} size{'s' if different > 1 else ''} over a factor of {factor:.2g}; "
            f"it takes {LEAST_SIZES} and {LEAST_FACTOR:g}"
        )

    def row(self) -> dict[str, Value]:
        """Return the columns of a table that say what was fitted."""
        return {
            "over": self.over,
            "train_set": self.scope.train_set,
            "sizes": len(set(self.sizes)),
            "groups": len(set(self.groups)),
            "factor": max(self.sizes) / min(self.sizes),
        }

    def line(self) -> Line | None:
        """Return the fitted line."""
        return mixed_line(np.log2(self.sizes), np.array(self.values), self.groups)


# A point of a line: its group and size, and the analysis and model whose results it averages.
Point = tuple[str, float, Analysis, str]


def scaled(analysis: Analysis) -> Iterator[Sizes]:
    """Yield accuracies and differences over the sizes of models and over those of the training set, if these vary."""
    records = [result.record for result in analysis.results]
    sources = {record.model: str(record.parameters.get("model_source", "")) for record in records}
    known = {
        model: architecture_of(ModelSpec(name=model, source=source))
        for model, source in sources.items()
        if source
    }
    models: list[Point] = [
        (shapes.family, float(shapes.parameters), analysis, model)
        for model, shapes in known.items()
        if shapes
    ]
    families = [family for family, _ in {point[:2] for point in models}]
    if len(families) > len(set(families)):
        yield from _of(analysis, "parameters", models)
    values = [value for value in axes_of(records).get(PAIRS_AXIS, ()) if value.isdecimal()]
    at = {value: Analysis([*at_value(analysis.results, PAIRS_AXIS, value)]) for value in values}
    points = [(model, float(value), here, model) for value, here in at.items() for model in here.models]
    if points:
        first = next(item.record for item in analysis.results if item.record.reward == analysis.baseline)
        results = [result for here in at.values() for result in here.results]
        every = Analysis(results, baseline=reward_without(first, PAIRS_AXIS))
        yield from _of(every, PAIRS_AXIS, points)


def _of(analysis: Analysis, over: str, points: Sequence[Point]) -> Iterator[Sizes]:
    asked = [(reward_title(kind), kind, "") for kind in analysis.rewards]
    asked += [(analysis.title(kind), kind, analysis.baseline) for kind in analysis.others]
    for scope, (what, kind, baseline) in itertools.product(analysis.categories(), asked):
        found = []
        for group, size, here, model in points:
            if baseline:
                mean = here.difference(scope, "accuracy", [model], baseline=baseline, other=kind)
            else:
                mean = here.mean(scope, kind, "accuracy", [model])
            if mean:
                found.append((size, group, mean.value))
        if found:
            sizes, groups, values = zip(*found, strict=True)
            reward = "" if baseline else kind
            yield Sizes(
                over=over, scope=scope, what=what, reward=reward, sizes=sizes, groups=groups, values=values
            )


def scaling_table(analysis: Analysis) -> Table:
    """Return what a doubling of size adds to each number, and the line at its ends; ranges that are too short share a row."""
    rows: list[dict[str, Value]] = []
    short: dict[tuple[str, str], Sizes] = {}
    for item in scaled(analysis):
        if item.too_short:
            place = item.over, item.scope.train_set
            short[place] = max(short.get(place, item), item, key=lambda item: len(set(item.sizes)))
            continue
        row = {**item.row(), "category": item.scope.category, "number": item.what}
        if line := item.line():
            ends = [float(np.log2(end(item.sizes))) for end in (min, max)]
            rise = line.rise()
            row |= {"rise": rise, "p": rise.p, "smallest": line.at(ends[0]), "largest": line.at(ends[1])}
        elif len(item.values) < len(set(item.groups)) + 2:
            row["said"] = "too few points to tell by"
        else:
            row["said"] = "no scatter about the line to tell by"
        rows.append(row)
    return Table(
        name="scaling",
        title="Over size",
        note="Accuracy over the logarithm of size: what a doubling adds, and the fitted line at the smallest and the largest size. Mixed "
        "model with a random intercept for each family (over train-pairs: each model); 95 % intervals. It does not hold for other "
        "sizes. docs/design.md.",
        columns="over train_set category number sizes groups factor rise p smallest largest said",
        titles={
            "number": "accuracy of",
            "rise": "a doubling adds",
            "factor": "largest / smallest",
            "said": "note",
        },
        rows=[*({**item.row(), "said": item.too_short} for item in short.values()), *rows],
        forms={"rise": "+.3f", "factor": ".3g", "p": ".2g"},
    )


def draw_scaling(analysis: Analysis) -> "Figure | None":
    """Draw values, fitted lines and intervals over size: a panel for each training set, category and kind of size."""
    found = [item for item in scaled(analysis) if not item.too_short]
    places = list(dict.fromkeys((item.over, item.scope) for item in found))
    if not places:
        return None
    figure, axes = panels(len(places), 3, 3.2, 2.6)
    kinds = list(dict.fromkeys(item.reward for item in found if item.reward))
    for (over, scope), axis in zip(places, axes, strict=True):
        for item in (item for item in found if (item.over, item.scope) == (over, scope)):
            style = (
                line_style(item.reward, kinds)
                if item.reward
                else {"color": GREY, "linestyle": ":", "marker": "x", "markersize": 4}
            )
            axis.plot(item.sizes, item.values, **{**style, "linestyle": "none"})
            at = np.geomspace(min(item.sizes), max(item.sizes), 30)
            axis.plot([], [], label=item.what, **style)
            if line := item.line():
                drawn = [line.at(float(x)) for x in np.log2(at)]
                low, mean, high = zip(*((here.low, here.value, here.high) for here in drawn), strict=True)
                axis.plot(at, mean, **{**style, "marker": None})
                axis.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(
            xscale="log",
            xlabel=over,
            title=f"{scope.train_set} · {scope.category}",
            ylim=(-1.05 if any(v < 0 for i in found for v in i.values) else -0.05, 1.05),
        )
    axes[0].set_ylabel("accuracy")
    legend(figure, axes)
    return figure
