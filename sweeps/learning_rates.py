"""Is one learning rate fair to both reward types? The grid at several rates; held-out training pairs choose the best.

A quarter of the training pairs is held out of every training and scored after each epoch. The best rate of a model,
reward type and training set is the one with the highest mean accuracy on them after the last epoch; of equals it is
the lowest. No evaluation set has a say in the choice: accuracies on those are in the sweep's report, a row for each
rate. A training that diverges is a hole of the sweep, and its rate is never the best.

python sweeps/learning_rates.py --profile laptop
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.cli.analyses import SUMMARY
from orchestrator.cli.main import Grid, main
from orchestrator.spec import catalog
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, FollowUp, TrainStage, TrialPlan
from orchestrator.spec.trials import Sweep, TrialSpec, only
from orchestrator.store.artifacts import Attempt
from sweeps.full_grid import full_grid
from trainers.specs import ValidationSpec

# Raise when the analysis does otherwise with the same trainings.
VERSION = 4
# Of the learning rate that the profile or --lr gives.
MULTIPLES = (0.2, 1.0, 5.0, 20.0)

LAPTOP = replace(
    catalog.LAPTOP,
    models=(catalog.MODELS["llama-64"],),
    train_sets=(catalog.dataset("tiny_world"),),
    eval_sets=(catalog.dataset("tiny_world"), catalog.dataset("tiny_world_paraphrase")),
    seeds=(0,),
    placements=(),
)
PROFILES = {"paper": catalog.PAPER, "laptop": LAPTOP}


def learning_rates(chosen: Selection) -> Sweep:
    """The grid, once for each learning rate."""
    grid = full_grid(replace(chosen, only=(), max_trials=None))
    trials = [_at(trial, trial.optim.lr * multiple) for multiple in MULTIPLES for trial in grid.trials]
    return replace(grid, trials=only(trials, chosen.only)[: chosen.max_trials])


def _at(trial: TrialSpec, lr: float) -> TrialSpec:
    optim = replace(trial.optim, lr=lr)
    return replace(trial, optim=optim, variant=f"lr_{lr:g}", validation=ValidationSpec())


def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """One analysis for each model, reward type and training set, over all rates and seeds."""
    groups: dict[str, list[TrainStage]] = {}
    for plan in plans:
        spec = plan.spec
        name = " · ".join((spec.model.name, spec.reward.name, spec.train_set.name))
        groups.setdefault(name, []).append(plan.train)
    return [
        AnalyseStage(analysis=name, version=VERSION, parameters=group[0].validation, reads=tuple(group))
        for name, group in groups.items()
    ]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write the mean accuracy on held-out pairs at each rate, and which rate is the best."""
    by_rate: dict[float, list[float | None]] = {}
    for training in stage.reads:
        assert isinstance(training, TrainStage)
        manifest = inputs.store.manifest(training.kind, training.key)
        # Who has no manifest failed for good.
        last = None if manifest is None else float(manifest["info"]["validation_accuracy"][-1])
        by_rate.setdefault(training.optim.lr, []).append(last)
    means = {
        lr: None if None in found else sum(value or 0.0 for value in found) / len(found)
        for lr, found in sorted(by_rate.items())
    }
    ranked = [(mean, -lr) for lr, mean in means.items() if mean is not None]
    results: dict[str, Any] = {
        "name": stage.analysis,
        "best_lr": -max(ranked)[1] if ranked else None,
        "rates": [{"lr": lr, "validation_accuracy": mean} for lr, mean in means.items()],
    }
    lines = [f"# {stage.analysis}", "", "| learning rate | accuracy on held-out pairs |", "|---|---|"]
    for lr, mean in means.items():
        best = ", the best" if lr == results["best_lr"] else ""
        lines.append(f"| {lr:g} | {'diverged' if mean is None else f'{mean:.3f}{best}'} |")
    (attempt.directory / "results.json").write_text(json.dumps(results, indent=1))
    (attempt.directory / SUMMARY).write_text("\n".join(lines) + "\n")
    attempt.info.update(results=results)


if __name__ == "__main__":
    follow_up = FollowUp(declare=declare, compute=compute)
    main(Grid(build=learning_rates, profiles=PROFILES, follow_up=follow_up), __file__, __doc__)
