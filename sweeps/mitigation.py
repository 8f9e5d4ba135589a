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
from dataclasses import replace
from typing import Any

from orchestrator.cli.main import Grid, main
from orchestrator.report.studies import Curve, compute_curve
from orchestrator.spec import catalog
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import AnalyseStage, EvaluateStage, TrialPlan
from orchestrator.spec.trials import Sweep, TrialSpec
from orchestrator.store.records import Category
from trainers.errors import SpecError
from trainers.specs import BUILTIN, Augmentation, DatasetSpec

# Raise when the curve is computed otherwise from the same scores. 3: each training set has a curve of its own.
VERSION = 3
SHARES = (0.0, 0.25, 0.5, 1.0)
_SHARE = "_share_"
_SETS = ("ultrafeedback", "ultrafeedback_paraphrase", "ultrafeedback_french")

PROFILES = {
    "paper": replace(
        catalog.PAPER,
        train_sets=(catalog.dataset("ultrafeedback"),),
        eval_sets=tuple(map(catalog.dataset, _SETS)),
        # The copies must not be left out by a draw.
        max_train_pairs=None,
    ),
    "laptop": replace(
        catalog.ONE_MODEL,
        eval_sets=(
            catalog.dataset("tiny_world"),
            *(
                DatasetSpec(name=name, source=f"{BUILTIN}{name}", rewriting_of="tiny_world")
                for name in ("tiny_world_reworded", "tiny_world_other_words")
            ),
        ),
        seeds=(0, 1, 2),
    ),
}


def mitigation(chosen: Selection) -> Sweep:
    """Every model with every reward type and every share of copies."""
    # Copies would not be in the draw that a set declares for itself.
    eval_sets = tuple(replace(item, train_draw=None) for item in chosen.eval_sets)
    trials: list[TrialSpec] = []
    categories: list[tuple[str, str, Category]] = []
    for original in (replace(item, train_draw=None) for item in chosen.train_sets):
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
    points: dict[str, list[tuple[tuple[Any, ...], EvaluateStage]]] = {}
    for plan in plans:
        spec, sets = plan.spec, plan.spec.eval_sets
        original, _, share = spec.train_set.name.partition(_SHARE)
        copies = next(item.name for item in sets if item.rewriting_of == original)
        for item, stage in zip(sets, plan.evaluations[-len(sets) :], strict=True):
            labels = (spec.model.name, original, item.name, item.name == copies, spec.reward.name)
            place = (*labels, float(share or 0))
            points.setdefault(spec.variant, []).append((place, stage))
    return [
        AnalyseStage(
            analysis=f"mitigation {point}".strip(),
            version=VERSION,
            compute=compute_curve,
            parameters=Curve(
                title="Accuracy by share of training pairs with a rewritten copy",
                names=("model", "train_set", "evaluation_set", "trained_with", "reward", "share"),
                places=tuple(place for place, _ in found),
            ),
            reads=tuple(stage for _, stage in found),
        )
        for point, found in points.items()
    ]


if __name__ == "__main__":
    main(Grid(build=mitigation, profiles=PROFILES, follow_up=declare), __file__, __doc__)
