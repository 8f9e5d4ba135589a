"""Is one learning rate fair to both reward types? The grid at the paper's one rate, and at each type's own best.

The rate of each model, training set and reward type is searched on training pairs that are held out: ASHA's rule ends
a training that is behind at a rung, and its artifact has the state `stopped`. Then every seed is trained at the best
rate on all training pairs, and evaluated as at the fixed rate. No evaluation set has a say in the choice.

python sweeps/learning_rates.py --profile laptop

The search runs in the driver's process, one training at a time on the CPU, on either
backend; Ray Tune has no part in it yet.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import catalog
from orchestrator.analyses import SUMMARY, AnalyseStage, Inputs
from orchestrator.artifacts import Attempt, Store
from orchestrator.cli import main
from orchestrator.compute import TrainCall, run_evaluations, run_train
from orchestrator.follow_up import FollowUp
from orchestrator.report import reward_title
from orchestrator.stages import EvaluateStage, PretrainStage, TrainStage
from orchestrator.trial_plan import TrialPlan
from sweeps.full_grid import full_grid
from trainers.errors import Diverged
from trainers.specs import Placement, ValidationSpec

# Raise when the search does otherwise with the same parameters.
VERSION = 1
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One search's outcome: accuracy on the validation pairs by epoch, for each rate; None is a training that diverged."""

    rates: tuple[float, ...]
    accuracies: tuple[tuple[float, ...] | None, ...]
    best: float


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


def goes_on(others: Sequence[float], accuracy: float, reduction: int) -> bool:
    """ASHA's rule: whether `accuracy` is among the best 1/`reduction` of what came to this rung, itself included."""
    ahead = sum(other > accuracy for other in others)
    return ahead < max(1, (len(others) + 1) // reduction)


def search(fixed: TrainStage, validation: ValidationSpec, placement: Placement, store: Store) -> Search:
    """Train at each rate in turn; what is in the store, stopped or not, is not trained again."""
    found: list[tuple[float, ...] | None] = []
    for rate in validation.rates:
        stage = replace(fixed, optim=replace(fixed.optim, lr=rate), validation=validation, keep_epochs=())
        reached = [some for some in found if some is not None]

        def decide(epoch: int, accuracy: float, reached: list[tuple[float, ...]] = reached) -> bool:
            if epoch not in validation.rungs:
                return True
            return goes_on(
                [some[epoch - 1] for some in reached if len(some) >= epoch], accuracy, validation.reduction
            )

        found.append(_accuracies(stage, TrainCall(placement=placement, goes_on=decide), store))
    # Who came furthest and is best there; of equals the lowest rate.
    ranked = [
        (len(some), some[-1], -rate)
        for rate, some in zip(validation.rates, found, strict=True)
        if some is not None
    ]
    if not ranked:
        raise Diverged(f"every learning rate of {validation.rates} diverged; lower --lr.")
    return Search(rates=validation.rates, accuracies=tuple(found), best=-max(ranked)[2])


def _accuracies(stage: TrainStage, call: TrainCall, store: Store) -> tuple[float, ...] | None:
    if not store.complete(stage.kind, stage.key):
        try:
            run_train(stage, call, store, lambda row: None)
        except Diverged:
            return None
    manifest = store.manifest(stage.kind, stage.key)
    assert manifest is not None
    return tuple(manifest["info"]["validation_accuracy"])


def compute(stage: AnalyseStage, inputs: Inputs, attempt: Attempt) -> None:
    """Search, then train and evaluate at the best rate what the sweep has at the fixed one."""
    from orchestrator.accuracies import seeds_accuracy

    store, validation = inputs.store, stage.parameters.validation
    trainings = [item for item in stage.reads if isinstance(item, TrainStage)]
    fixed = [item for item in stage.reads if isinstance(item, EvaluateStage)]
    placement = _placement(trainings[0])
    found = search(trainings[0], validation, placement, store)
    best = [_at(item, found.best) for item in fixed]
    for training in {item.train.key: item.train for item in best}.values():
        if not store.complete(training.kind, training.key):
            run_train(training, TrainCall(placement=placement), store, lambda row: None)
        run_evaluations([item for item in best if item.train.key == training.key], store, lambda row: None)
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(item.prepared.split.name for item in fixed):
        for which, items in (("fixed", fixed), ("best", best)):
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


def _placement(training: TrainStage) -> Placement:
    """One CPU process; tiny models take a step in one forward."""
    batch = training.optim.effective_batch
    if isinstance(training.base.origin, PretrainStage):
        return Placement(micro_batch=batch, accumulation=1)
    return Placement(micro_batch=1, accumulation=batch)


def _at(evaluation: EvaluateStage, lr: float) -> EvaluateStage:
    """The same evaluation of the training at another rate."""
    train = evaluation.train
    return replace(evaluation, train=replace(train, optim=replace(train.optim, lr=lr)))


def _state(accuracies: Sequence[float] | None, epochs: int) -> str:
    if accuracies is None:
        return "diverged"
    return "complete" if len(accuracies) == epochs else "stopped"


def _summary(results: dict[str, Any], training: TrainStage) -> str:
    lines = [
        f"# {results['name']}: {reward_title(training.reward.name)} at {results['best_lr']:g}",
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
        follow_up=FollowUp(declare=declare, compute=compute),
    )
