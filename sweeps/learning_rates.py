"""Is one learning rate fair to both reward types? The grid at the paper's one rate, and at each type's own best.

The rate of each model, training set and reward type is searched on training pairs that are held out: ASHA's rule ends
a training that is behind at a rung, and its artifact has the state `stopped`. Then every seed is trained at the best
rate on all training pairs, and evaluated as at the fixed rate. No evaluation set has a say in the choice.

python sweeps/learning_rates.py --profile laptop

The searched trainings and those at the best rate are trials like all others. On Ray the rule is that of Ray Tune's
ASHAScheduler over trainings that run at once, so that which of them it ends depends on who comes first; with
`--backend inline` the same rule is applied to one training after another.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import catalog
from orchestrator.analyse_stage import AnalyseStage, AnalysisInputs, FollowUp, Further
from orchestrator.artifacts import Attempt, Store
from orchestrator.cli import main
from orchestrator.follow_up import SUMMARY
from orchestrator.report import reward_title
from orchestrator.searches import at_rate, outcome, searched
from orchestrator.stages import EvaluateStage, TrainStage
from orchestrator.trial_plan import TrialPlan
from sweeps.full_grid import full_grid
from trainers.specs import ValidationSpec

# Raise when the search does otherwise with the same parameters.
VERSION = 2
# Of the fixed rate, in the order in which they are tried.
MULTIPLES = (1.0, 5.0, 20.0, 0.2)

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
    """How the rate is searched."""

    validation: ValidationSpec


def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """One search for each model, training set and reward type, over all its seeds."""
    groups: dict[tuple[str, str, str], list[TrialPlan]] = {}
    for plan in plans:
        spec = plan.spec
        groups.setdefault((spec.model.name, spec.reward_name, spec.train_set.name), []).append(plan)
    return [_stage(" · ".join(names), group) for names, group in groups.items()]


def _stage(name: str, group: Sequence[TrialPlan]) -> AnalyseStage:
    optim = group[0].train.optim
    reads: list[TrainStage | EvaluateStage] = []
    for plan in group:
        reads += [plan.train, *plan.evaluations]
    rungs = tuple(sorted({epoch for epoch in (optim.epochs // 4, optim.epochs // 2) if epoch >= 1}))
    rates = tuple(optim.lr * multiple for multiple in MULTIPLES)
    return AnalyseStage(
        analysis=name,
        version=VERSION,
        parameters=Parameters(validation=ValidationSpec(rungs=rungs, rates=rates)),
        base=group[0].train.base,
        reads=tuple(reads),
    )


def further(stage: AnalyseStage, plans: Sequence[TrialPlan], store: Store) -> Further:
    """The search's trainings, and once these are done all that the sweep has at the fixed rate at the best one."""
    read = {item.key for item in stage.reads}
    group = [plan for plan in plans if plan.key in read]
    trainings = searched(group[0].train, stage.parameters.validation)
    trials = tuple(_trial(group[0], "search", training, ()) for training in trainings)
    found = outcome(trainings, store)
    if found is None or found.best is None:
        return Further(trials=trials, whole=found is not None)
    best = tuple(_at_best(plan, found.best) for plan in group)
    return Further(trials=(*trials, *best))


def _at_best(plan: TrialPlan, lr: float) -> TrialPlan:
    evaluations = tuple(_at(evaluation, lr) for evaluation in plan.evaluations)
    return _trial(plan, "best", at_rate(plan.train, lr), evaluations)


def _trial(
    plan: TrialPlan, what: str, training: TrainStage, evaluations: tuple[EvaluateStage, ...]
) -> TrialPlan:
    """A trial like `plan`, trained otherwise; its name says so."""
    spec = replace(
        plan.spec,
        optim=training.optim,
        keep_epochs=training.keep_epochs,
        eval_sets=plan.spec.eval_sets if evaluations else (),
        variant="_".join(filter(None, (plan.spec.variant, what, f"lr_{training.optim.lr:g}"))),
    )
    return replace(plan, spec=spec, train=training, evaluations=evaluations)


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """The search's outcome, and the accuracies at the fixed rate beside those at the best."""
    from orchestrator.accuracies import seeds_accuracy

    store = inputs.store
    trainings = [item for item in stage.reads if isinstance(item, TrainStage)]
    fixed = [item for item in stage.reads if isinstance(item, EvaluateStage)]
    found = outcome(searched(trainings[0], stage.parameters.validation), store)
    assert found is not None
    rated = [("fixed", fixed)]
    if found.best is not None:
        rated.append(("best", [_at(item, found.best) for item in fixed]))
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(item.prepared.split.name for item in fixed):
        for which, items in rated:
            some = [
                item
                for item in items
                if item.prepared.split.name == name and item.epoch == item.train.optim.epochs
            ]
            accuracy = seeds_accuracy(some, store)
            rows.append(
                {
                    "evaluation_set": name,
                    "rate": which,
                    "lr": some[0].train.optim.lr,
                    "seeds": len(some),
                    "accuracy": accuracy.value,
                    "low": accuracy.low,
                    "high": accuracy.high,
                }
            )
    results = {
        "name": stage.analysis,
        "best_lr": found.best,
        "trials": [
            {"lr": rate, "state": _state(some, trainings[0].optim.epochs), "validation_accuracy": some}
            for rate, some in zip(found.rates, found.accuracies, strict=True)
        ],
        "accuracy": rows,
    }
    (attempt.directory / "results.json").write_text(json.dumps(results, indent=1))
    (attempt.directory / SUMMARY).write_text(_summary(results, trainings[0]))
    attempt.info.update(results=results)


def _at(evaluation: EvaluateStage, lr: float) -> EvaluateStage:
    """The same evaluation of the training at another rate."""
    return replace(evaluation, train=at_rate(evaluation.train, lr))


def _state(accuracies: Sequence[float] | None, epochs: int) -> str:
    if accuracies is None:
        return "diverged"
    return "complete" if len(accuracies) == epochs else "stopped"


def _summary(results: dict[str, Any], training: TrainStage) -> str:
    best = "no rate: all diverged" if results["best_lr"] is None else f"{results['best_lr']:g}"
    lines = [
        f"# {results['name']}: {reward_title(training.reward.name)} at {best}",
        "",
        "| learning rate | state | epochs | validation accuracy |",
        "|---|---|---|---|",
    ]
    for trial in results["trials"]:
        values = trial["validation_accuracy"] or []
        last = f"{values[-1]:.3f}" if values else "–"
        lines.append(f"| {trial['lr']:g} | {trial['state']} | {len(values)} | {last} |")
    lines += ["", "| evaluated on | rate | learning rate | seeds | accuracy |", "|---|---|---|---|---|"]
    for row in results["accuracy"]:
        interval = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        lines.append(
            f"| {row['evaluation_set']} | {row['rate']} | {row['lr']:g} | {row['seeds']} | {interval} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(
        "learning_rates",
        full_grid,
        Path(__file__).parent,
        profiles=PROFILES,
        follow_up=FollowUp(declare=declare, compute=compute, further=further),
    )
