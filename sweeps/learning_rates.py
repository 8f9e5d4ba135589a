"""Is one learning rate fair to both reward types? Every trial at several rates, and each type's best by held-out pairs.

A quarter of the training pairs is held out of every training and scored after each epoch. The best rate of a model,
training set and reward type is the one whose mean accuracy on them is highest in the end; of equals it is the lowest.
No evaluation set has a say in the choice. A training that diverges is a hole of the sweep, and never the best.

python sweeps/learning_rates.py --profile laptop
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.cli.follow_up import SUMMARY
from orchestrator.cli.main import main
from orchestrator.report.tables import reward_title
from orchestrator.spec import catalog
from orchestrator.spec.analyses import AnalyseStage, AnalysisInputs, FollowUp
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import EvaluateStage, TrainStage
from orchestrator.spec.trial_plan import TrialPlan
from orchestrator.spec.trials import Recipe, Sweep, grid, only
from orchestrator.store.artifacts import Attempt, Store
from trainers.specs import DatasetSpec, ModelSpec, OptimSpec, ValidationSpec

# Raise when the analysis does otherwise with the same trainings.
VERSION = 3
# Of the learning rate that the profile or --lr gives.
MULTIPLES = (0.2, 1.0, 5.0, 20.0)

PAPER = catalog.PAPER
LAPTOP = replace(
    catalog.LAPTOP,
    models=(catalog.MODELS["llama-64"],),
    train_sets=(catalog.dataset("tiny_world"),),
    eval_sets=(catalog.dataset("tiny_world"), catalog.dataset("tiny_world_paraphrase")),
    seeds=(0,),
    placements=(),
)
PROFILES = {"paper": PAPER, "laptop": LAPTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How the rates are compared."""

    validation: ValidationSpec


def learning_rates(chosen: Selection) -> Sweep:
    """The grid, once for each learning rate."""
    trials = tuple(
        trial
        for multiple in MULTIPLES
        for trial in grid(
            models=chosen.models,
            rewards=chosen.rewards,
            train_sets=chosen.train_sets,
            eval_sets=chosen.eval_sets,
            seeds=chosen.seeds,
            recipe=_scaled(chosen.recipe, multiple),
            train_draw=chosen.train_draw,
            eval_draw=chosen.eval_draw,
            validation=ValidationSpec(),
        )
    )
    named = tuple(replace(trial, variant=f"lr_{trial.optim.lr:g}") for trial in trials)
    return Sweep(
        name=chosen.name,
        trials=only(named, chosen.only)[: chosen.max_trials],
        categories=chosen.categories,
        placements=chosen.placements,
    )


def _scaled(recipe: Recipe, multiple: float) -> Recipe:
    def scaled(model: ModelSpec, train_set: DatasetSpec) -> OptimSpec:
        optim = recipe(model, train_set)
        return replace(optim, lr=optim.lr * multiple)

    return scaled


def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """One analysis for each model, training set and reward type, over all rates and seeds."""
    groups: dict[tuple[str, str, str], list[TrialPlan]] = {}
    for plan in plans:
        spec = plan.spec
        groups.setdefault((spec.model.name, spec.reward.name, spec.train_set.name), []).append(plan)

    def reads(group: Sequence[TrialPlan]) -> Iterator[TrainStage | EvaluateStage]:
        for plan in group:
            yield plan.train
            yield from plan.evaluations

    return [
        AnalyseStage(
            analysis=" · ".join(names),
            version=VERSION,
            parameters=Parameters(validation=ValidationSpec()),
            base=group[0].train.base,
            reads=tuple(reads(group)),
        )
        for names, group in groups.items()
    ]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write a row for each rate: validation accuracy by seed, and the accuracy on every evaluation set."""
    from orchestrator.report.results import seeds_accuracy

    trainings = [item for item in stage.reads if isinstance(item, TrainStage)]
    evaluations = [item for item in stage.reads if isinstance(item, EvaluateStage)]
    rows: list[dict[str, Any]] = []
    for lr in sorted({training.optim.lr for training in trainings}):
        seeds = [item for item in trainings if item.optim.lr == lr]
        validated = [accuracy for item in seeds if (accuracy := _validated(item, inputs.store)) is not None]
        accuracies = {}
        if len(validated) == len(seeds):
            for name in dict.fromkeys(item.prepared.split.name for item in evaluations):
                here = [e for e in evaluations if (e.train.optim.lr, e.prepared.split.name) == (lr, name)]
                accuracies[name] = seeds_accuracy(here, inputs.store)
        rows.append(
            {
                "lr": lr,
                "seeds": len(validated),
                "validation_accuracy": sum(validated) / len(validated) if accuracies else None,
                "accuracy": {
                    name: [found.value, found.low, found.high] for name, found in accuracies.items()
                },
            }
        )
    whole = [row for row in rows if row["validation_accuracy"] is not None]
    best = min(whole, key=lambda row: (-row["validation_accuracy"], row["lr"]))["lr"] if whole else None
    results = {"name": stage.analysis, "best_lr": best, "rates": rows}
    (attempt.directory / "results.json").write_text(json.dumps(results, indent=1))
    (attempt.directory / SUMMARY).write_text(_summary(results, trainings[0]))
    attempt.info.update(results=results)


def _validated(training: TrainStage, store: Store) -> float | None:
    """Accuracy on the held-out pairs after the last epoch; None where the training failed for good."""
    manifest = store.manifest(training.kind, training.key)
    return None if manifest is None else float(manifest["info"]["validation_accuracy"][-1])


def _summary(results: Mapping[str, Any], training: TrainStage) -> str:
    best = "no rate: all diverged" if results["best_lr"] is None else f"{results['best_lr']:g}"
    names = next((list(row["accuracy"]) for row in results["rates"] if row["accuracy"]), [])
    lines = [
        f"# {results['name']}: {reward_title(training.reward.name)} at {best}",
        "",
        f"| learning rate | seeds | held-out pairs | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in results["rates"]:
        cells = [f"{row['lr']:g}", str(row["seeds"])]
        if row["validation_accuracy"] is None:
            cells += ["diverged", *("–" for _ in names)]
        else:
            cells.append(f"{row['validation_accuracy']:.3f}")
            cells += ["{:.3f} [{:.3f}, {:.3f}]".format(*row["accuracy"][name]) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(
        "learning_rates",
        learning_rates,
        Path(__file__).parent,
        profiles=PROFILES,
        follow_up=FollowUp(declare=declare, compute=compute),
    )
