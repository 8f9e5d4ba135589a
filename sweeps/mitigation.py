"""Can an IM-RM be made to ignore tokens? Training with rewritten copies, judged on another rewriting (paper §6.9).

A share of the training pairs gets a copy in other words. What counts is the accuracy on a rewriting in yet other words
(full size: French, for who trained with paraphrases), by share, for both reward types. Copies are more pairs, so a
larger share takes more steps as well.

python sweeps/mitigation.py --profile laptop
python sweeps/mitigation.py --train-sets ultrafeedback=DIR --eval-sets ultrafeedback=DIR \\
    ultrafeedback_paraphrase=DIR ultrafeedback_french=DIR

Of the evaluation sets, the first that rewrites the training set gives the copies, by its training split.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cli.main import Grid, main
from orchestrator.report.house_style import write_figure
from orchestrator.report.tables import Table, reward_title, write_summary
from orchestrator.spec import catalog
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, EvaluateStage, FollowUp, TrialPlan
from orchestrator.spec.trials import Recipe, Sweep, TrialSpec, grid, only
from orchestrator.store.artifacts import Attempt
from orchestrator.store.records import Category
from trainers.errors import SpecError
from trainers.specs import BUILTIN, Augmentation, DatasetSpec, ModelSpec, OptimSpec

# Raise when the curve is computed otherwise from the same scores.
VERSION = 1
SHARES = (0.0, 0.25, 0.5, 1.0)
_SHARE = "_share_"


def _rewriting(name: str) -> DatasetSpec:
    return DatasetSpec(name=name, source=f"{BUILTIN}{name}", rewriting_of="tiny_world")


PAPER = replace(
    catalog.PAPER,
    train_sets=(catalog.dataset("ultrafeedback"),),
    eval_sets=tuple(
        catalog.dataset(name)
        for name in ("ultrafeedback", "ultrafeedback_paraphrase", "ultrafeedback_french")
    ),
    # The copies must not be left out by a draw.
    max_train_pairs=None,
)
LAPTOP = replace(
    catalog.LAPTOP,
    models=(catalog.MODELS["llama-64"],),
    train_sets=(catalog.dataset("tiny_world"),),
    eval_sets=(
        catalog.dataset("tiny_world"),
        _rewriting("tiny_world_reworded"),
        _rewriting("tiny_world_other_words"),
    ),
    seeds=(0, 1, 2),
    placements=(),
)
PROFILES = {"paper": PAPER, "laptop": LAPTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Evaluations of one point of a curve: as many as `seeds` of those that the analysis reads."""

    model: str
    reward: str
    evaluation_set: str
    trained_with: bool
    share: float
    seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The points, in the order of what is read."""

    points: tuple[Point, ...]


def mitigation(chosen: Selection) -> Sweep:
    """Every model with every reward type and every share of copies."""
    chosen = replace(chosen, train_sets=_whole(chosen.train_sets), eval_sets=_whole(chosen.eval_sets))
    trials: list[TrialSpec] = []
    categories: list[tuple[str, str, Category]] = []
    for original in chosen.train_sets:
        trained_with = _source_of_copies(original, chosen.eval_sets)
        augmented = [_with_copies(original, trained_with, share) for share in SHARES]
        trials += grid(
            models=chosen.models,
            rewards=chosen.rewards,
            train_sets=augmented,
            eval_sets=chosen.eval_sets,
            seeds=chosen.seeds,
            recipe=_of_original(chosen.recipe, original),
            train_draw=chosen.train_draw,
            eval_draw=chosen.eval_draw,
            keep_epochs=chosen.keep_epochs,
        )
        categories += [
            (train_set.name, item.name, category)
            for train_set in augmented
            for item in chosen.eval_sets
            if (category := _category(original, item)) is not None
        ]
    given = {(train, evaluated) for train, evaluated, _ in chosen.categories}
    return Sweep(
        name=chosen.name,
        trials=only(trials, chosen.only)[: chosen.max_trials],
        categories=(*(item for item in categories if item[:2] not in given), *chosen.categories),
        placements=chosen.placements,
    )


def _source_of_copies(original: DatasetSpec, eval_sets: Sequence[DatasetSpec]) -> DatasetSpec:
    found = [item for item in eval_sets if item.rewriting_of == original.name]
    if len(found) < 2:
        raise SpecError(
            f"--eval-sets holds {len(found)} rewritings of {original.name}; two are needed: the first gives the copies, "
            "the others are what is asked about."
        )
    return found[0]


def _whole(sets: Sequence[DatasetSpec]) -> tuple[DatasetSpec, ...]:
    """Without draws of their own, which copies would not be among."""
    return tuple(replace(item, train_draw=None) for item in sets)


def _with_copies(original: DatasetSpec, rewriting: DatasetSpec, share: float) -> DatasetSpec:
    """Share 0 is the set itself, so that its trainings are those of every other sweep."""
    if share == 0:
        return original
    added = Augmentation(source=rewriting.source, split=rewriting.train_split, share=share)
    return replace(original, name=f"{original.name}{_SHARE}{share}", augmentation=added)


def _of_original(recipe: Recipe, original: DatasetSpec) -> Recipe:
    """The recipe of the set without copies, whatever the share."""

    def of(model: ModelSpec, train_set: DatasetSpec) -> OptimSpec:
        return recipe(model, original)

    return of


def _category(original: DatasetSpec, evaluated: DatasetSpec) -> Category | None:
    if evaluated.rewriting_of == original.name:
        return "token-level shift"
    return "in-distribution" if evaluated.source == original.source else None


def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """One curve of all trials."""
    groups: dict[Point, list[EvaluateStage]] = {}
    for plan in plans:
        for point, stage in _points(plan):
            groups.setdefault(point, []).append(stage)
    points = tuple(replace(point, seeds=len(stages)) for point, stages in groups.items())
    reads = tuple(stage for stages in groups.values() for stage in stages)
    return [
        AnalyseStage(
            analysis="accuracy by share of copies",
            version=VERSION,
            parameters=Parameters(points=points),
            reads=reads,
        )
    ]


def _points(plan: TrialPlan) -> Iterator[tuple[Point, EvaluateStage]]:
    added = plan.spec.train_set.augmentation
    last = plan.evaluations[-len(plan.spec.eval_sets) :]
    original = plan.spec.train_set.name.partition(_SHARE)[0]
    rewritings = [item.name for item in plan.spec.eval_sets if item.rewriting_of == original]
    for stage, dataset in zip(last, plan.spec.eval_sets, strict=True):
        point = Point(
            model=plan.spec.model.name,
            reward=plan.spec.reward_name,
            evaluation_set=dataset.name,
            trained_with=dataset.name in rewritings[:1],
            share=0.0 if added is None else added.share,
            seeds=0,
        )
        yield point, stage


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """The curve as table, CSV and figure."""
    from orchestrator.report.results import seeds_accuracy

    evaluations = [item for item in stage.reads if isinstance(item, EvaluateStage)]
    rows: list[dict[str, Any]] = []
    for point in stage.parameters.points:
        some, evaluations = evaluations[: point.seeds], evaluations[point.seeds :]
        found = seeds_accuracy(some, inputs.store)
        rows.append(
            {
                **{name: getattr(point, name) for name in Point.__slots__},
                "accuracy": found.value,
                "low": found.low,
                "high": found.high,
            }
        )
    rows.sort(key=lambda row: (row["model"], row["evaluation_set"], row["reward"], row["share"]))
    results = {"name": "mitigation", "curve": rows}
    curve = Table(name="curve", title="", columns=" ".join(rows[0]), rows=rows)
    (attempt.directory / "curve.parquet").write_bytes(curve.parquet())
    (attempt.directory / "curve.csv").write_text(curve.csv())
    (attempt.directory / "results.json").write_text(json.dumps(results, indent=1))
    write_summary(
        attempt.directory,
        "Accuracy by share of training pairs with a rewritten copy",
        ["Mean over seeds, 95 % interval over test pairs and seeds.", _by_share(rows).markdown()],
    )
    write_figure(attempt.directory, "mitigation", lambda: _draw(rows))


def _estimate(row: dict[str, Any]) -> Any:
    from orchestrator.report.statistics import Estimate

    return Estimate(value=row["accuracy"], low=row["low"], high=row["high"])


def _by_share(rows: Sequence[dict[str, Any]]) -> Table:
    """A column for each share."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        evaluated = f"{row['evaluation_set']}{' (trained with)' if row['trained_with'] else ''}"
        place = (row["model"], evaluated, reward_title(row["reward"]))
        lines.setdefault(place, {})[f"{row['share']:g}"] = _estimate(row)
    shares = " ".join(f"{share:g}" for share in sorted({row["share"] for row in rows}))
    shown = [
        {"model": model, "evaluation_set": name, "reward": reward, **line}
        for (model, name, reward), line in lines.items()
    ]
    return Table(name="shares", title="", columns=f"model evaluation_set reward {shares}", rows=shown)


def _draw(rows: Sequence[dict[str, Any]]) -> Any:
    """A row per model and a column per evaluation set."""
    from orchestrator.report.house_style import GREY, legend, panels, points

    models, sets, kinds = (
        sorted({row[name] for row in rows}) for name in ("model", "evaluation_set", "reward")
    )
    figure, axes = panels(len(models), len(sets), 5.0, 4.0)
    places = [(model, name) for model in models for name in sets]
    for axis, place in zip(axes, places, strict=True):
        for kind in kinds:
            line = [
                row for row in rows if (row["model"], row["evaluation_set"], row["reward"]) == (*place, kind)
            ]
            points(axis, [row["share"] for row in line], [_estimate(row) for row in line], kind, kinds)
        axis.axhline(0.5, color=GREY, linewidth=0.8)
        title = " · ".join(reversed(place))
        axis.set(title=title, xlabel="share of pairs with a copy", ylabel="accuracy", ylim=(-0.03, 1.03))
    legend(figure, axes)
    return figure


if __name__ == "__main__":
    follow_up = FollowUp(declare=declare, compute=compute)
    main(Grid(build=mitigation, profiles=PROFILES, follow_up=follow_up), __file__, __doc__)
