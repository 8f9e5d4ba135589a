"""Can an IM-RM be made to ignore tokens? Training with rewritten copies, judged on another rewriting (paper §6.9).

A share of the training pairs gets a copy in other words. What counts is the accuracy on a rewriting in yet other words
(full size: French, for who trained with paraphrases), by share, for both reward types. Copies are more pairs, so a
larger share takes more steps as well.

python sweeps/mitigation.py --profile laptop
python sweeps/mitigation.py --train-sets ultrafeedback=DIR --eval-sets ultrafeedback=DIR \\
    ultrafeedback_paraphrase=DIR ultrafeedback_french=DIR

Of the evaluation sets, the first that rewrites the training set gives the copies, by its training split.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cli.main import Grid, main
from orchestrator.report.analysis_files import Rows, draw_lines, write_analysis
from orchestrator.report.house_style import GREY, legend
from orchestrator.report.results import seeds_accuracy
from orchestrator.report.tables import Table, reward_title
from orchestrator.spec import catalog
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, EvaluateStage, TrialPlan
from orchestrator.spec.trials import Sweep, TrialSpec
from orchestrator.store.artifacts import Attempt
from orchestrator.store.records import Category
from trainers.errors import SpecError
from trainers.specs import BUILTIN, Augmentation, DatasetSpec

# Raise when the curve is computed otherwise from the same scores.
VERSION = 2
SHARES = (0.0, 0.25, 0.5, 1.0)
_SHARE = "_share_"
_REWRITINGS = ("ultrafeedback_paraphrase", "ultrafeedback_french")
_TINY_REWRITINGS = ("tiny_world_reworded", "tiny_world_other_words")

PROFILES = {
    "paper": replace(
        catalog.PAPER,
        train_sets=(catalog.dataset("ultrafeedback"),),
        eval_sets=tuple(map(catalog.dataset, ("ultrafeedback", *_REWRITINGS))),
        # The copies must not be left out by a draw.
        max_train_pairs=None,
    ),
    "laptop": replace(
        catalog.ONE_MODEL,
        eval_sets=(
            catalog.dataset("tiny_world"),
            *(
                DatasetSpec(name=name, source=f"{BUILTIN}{name}", rewriting_of="tiny_world")
                for name in _TINY_REWRITINGS
            ),
        ),
        seeds=(0, 1, 2),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The names in the table, and the evaluation sets that gave copies."""

    trials: tuple[str, ...]
    eval_sets: tuple[str, ...]
    trained_with: tuple[str, ...]


def mitigation(chosen: Selection) -> Sweep:
    """Every model with every reward type and every share of copies."""
    # Copies would not be in the draw that a set declares for itself.
    train_sets, eval_sets = (
        tuple(replace(item, train_draw=None) for item in sets)
        for sets in (chosen.train_sets, chosen.eval_sets)
    )
    trials: list[TrialSpec] = []
    categories: list[tuple[str, str, Category]] = []
    for original in train_sets:
        rewritings = [item for item in eval_sets if item.rewriting_of == original.name]
        if len(rewritings) < 2:
            raise SpecError(
                f"--eval-sets holds {len(rewritings)} rewritings of {original.name}; two are needed: the first gives the copies, "
                "the others are what is asked about."
            )
        augmented = [_with_copies(original, rewritings[0], share) for share in SHARES]
        # Whatever the share, the recipe is that of the set without copies.
        for trial in chosen.trials(train_sets=(original,), eval_sets=eval_sets):
            trials += [replace(trial, train_set=train_set) for train_set in augmented]
        for train_set, item in itertools.product(augmented, eval_sets):
            if item in rewritings:
                categories.append((train_set.name, item.name, "token-level shift"))
            elif item.source == original.source:
                categories.append((train_set.name, item.name, "in-distribution"))
    return chosen.sweep(trials, categories)


def _with_copies(original: DatasetSpec, rewriting: DatasetSpec, share: float) -> DatasetSpec:
    """Share 0 is the set itself, so that its trainings are those of every other sweep."""
    if share == 0:
        return original
    added = Augmentation(source=rewriting.source, split=rewriting.train_split, share=share)
    return replace(original, name=f"{original.name}{_SHARE}{share}", augmentation=added)


def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """A curve of the trials at each point of the sweep's axes."""
    points: dict[str, list[TrialPlan]] = {}
    for plan in plans:
        points.setdefault(plan.spec.variant, []).append(plan)
    return [_curve(point, found) for point, found in points.items()]


def _curve(point: str, plans: Sequence[TrialPlan]) -> AnalyseStage:
    sets = plans[0].spec.eval_sets
    originals = dict.fromkeys(plan.spec.train_set.name.partition(_SHARE)[0] for plan in plans)
    copies = (next(item.name for item in sets if item.rewriting_of == original) for original in originals)
    parameters = Parameters(
        trials=tuple(plan.spec.name for plan in plans),
        eval_sets=tuple(item.name for item in sets),
        trained_with=tuple(copies),
    )
    return AnalyseStage(
        analysis=f"accuracy by share of copies {point}".strip(),
        version=VERSION,
        compute=compute,
        parameters=parameters,
        reads=tuple(stage for plan in plans for stage in plan.evaluations[-len(sets) :]),
    )


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """The curve as table, CSV and figure."""
    found: dict[tuple[str, str, str, float], list[EvaluateStage]] = {}
    for item in stage.reads:
        assert isinstance(item, EvaluateStage)
        if not inputs.store.complete(item.kind, item.key):
            # Of a training that failed for good; the others are what is said.
            continue
        share = item.train.prepared.split.name.partition(_SHARE)[2] or 0
        place = (item.train.base.name, item.train.reward.name, item.prepared.split.name, float(share))
        found.setdefault(place, []).append(item)
    rows: list[dict[str, Any]] = [
        {
            "model": model,
            "reward": reward,
            "evaluation_set": dataset,
            "trained_with": dataset in stage.parameters.trained_with,
            "share": share,
            "seeds": len(some),
            "accuracy": seeds_accuracy(some, inputs.store),
        }
        for (model, reward, dataset, share), some in found.items()
    ]
    rows.sort(key=lambda row: (row["model"], row["evaluation_set"], row["reward"], row["share"]))
    curve = Table(name="curve", title="", columns=" ".join(rows[0]), rows=rows)
    (attempt.directory / "curve.csv").write_text(curve.csv())
    write_analysis(
        attempt,
        "Accuracy by share of training pairs with a rewritten copy",
        ["Mean over seeds, 95 % interval over test pairs and seeds.", _by_share(rows).markdown()],
        results={"name": "mitigation", "curve": rows},
        rows={"curve": curve.records()},
        figures={"mitigation": lambda: _draw(rows)},
    )


def _by_share(rows: Rows) -> Table:
    """A column for each share."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        evaluated = f"{row['evaluation_set']}{' (trained with)' if row['trained_with'] else ''}"
        line = {"model": row["model"], "evaluation_set": evaluated, "reward": reward_title(row["reward"])}
        shares = lines.setdefault((row["model"], evaluated, row["reward"]), line)
        shares[f"{row['share']:g}"] = row["accuracy"]
    shown = " ".join(f"{share:g}" for share in sorted({row["share"] for row in rows}))
    columns = f"model evaluation_set reward {shown}"
    return Table(name="shares", title="", columns=columns, rows=list(lines.values()))


def _draw(rows: Rows) -> Any:
    """A row per model and a column per evaluation set."""
    sets = len({row["evaluation_set"] for row in rows})
    where = ("evaluation_set", "model")
    figure, axes = draw_lines(rows, where, "share", "accuracy", columns=sets, width=5.0, height=4.0)
    for axis in axes.values():
        axis.axhline(0.5, color=GREY, linewidth=0.8)
        axis.set_xlabel("share of pairs with a copy")
    legend(figure, axes.values())
    return figure


if __name__ == "__main__":
    main(Grid(build=mitigation, profiles=PROFILES, follow_up=declare), __file__, __doc__)
