"""Is one learning rate fair to both reward types? The grid at several rates; held-out training pairs choose the best.

A quarter of the training pairs is held out of every training and scored after each epoch. The best rate of a model,
reward type and training set is the one with the highest mean accuracy on them after the last epoch; of equals it is
the lowest. No evaluation set has a say in the choice: accuracies on those are in the sweep's report, a row for each
rate. A training that diverges is a hole of the sweep, and its rate is never the best.

python sweeps/learning_rates.py --profile laptop
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.cli.main import Grid, main
from orchestrator.report.analysis_files import write_analysis
from orchestrator.report.tables import Table
from orchestrator.spec import catalog
from orchestrator.spec.axes import varied
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, TrainStage, TrialPlan
from orchestrator.spec.trials import Sweep
from orchestrator.store.artifacts import Attempt
from trainers.errors import SpecError

# Raise when the analysis finds something else in the same trainings.
VERSION = 4
# Multiples of the learning rate of the profile, or of --lr.
MULTIPLES = (0.2, 1.0, 5.0, 20.0)

PROFILES = {"paper": catalog.PAPER, "laptop": catalog.ONE_MODEL}


def learning_rates(chosen: Selection) -> Sweep:
    """The grid along an axis of learning rates: multiples of its own rate, unless --axis gives rates."""
    trials = chosen.trials(axes={"validation-share": (0.25,)})
    if not all(trial.validation for trial in trials):
        raise SpecError(
            "--validation-share 0: held-out pairs choose the best rate; give a share of the pairs."
        )
    given = [trial for trial in trials if "lr" in dict(trial.axes)]
    multiples = (
        varied(trial, {"lr": float(f"{multiple * trial.optim.lr:.6g}")})
        for multiple in MULTIPLES
        for trial in trials
        if trial not in given
    )
    return chosen.sweep([*given, *multiples])


def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """One analysis for each model, reward type, training set and point of other axes, over all rates and seeds."""
    groups: dict[str, list[TrainStage]] = {}
    for plan in plans:
        spec = plan.spec
        others = replace(spec, axes=tuple(item for item in spec.axes if item[0] != "lr"))
        name = " · ".join((spec.model.name, others.reward_name, spec.train_set.name))
        groups.setdefault(name, []).append(plan.train)
    return [
        AnalyseStage(
            analysis=name,
            version=VERSION,
            compute=compute,
            parameters=group[0].validation,
            reads=tuple(group),
        )
        for name, group in groups.items()
    ]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write the mean accuracy on held-out pairs at each rate, and which rate is the best."""
    found: dict[float, list[Any]] = {}
    for training in stage.reads:
        assert isinstance(training, TrainStage)
        manifest = inputs.store.manifest(training.kind, training.key)
        # A training without a manifest failed for good.
        last = None if manifest is None else float(manifest["info"]["validation_accuracy"][-1])
        found.setdefault(training.optim.lr, []).append(last)
    means = {lr: None if None in last else sum(last) / len(last) for lr, last in sorted(found.items())}
    ranked = [(mean, -lr) for lr, mean in means.items() if mean is not None]
    best = -max(ranked)[1] if ranked else None
    shown = {lr: "diverged" if mean is None else f"{mean:.3f}" for lr, mean in means.items()}
    table = Table(
        name="rates",
        title="",
        columns="lr accuracy",
        titles={"lr": "learning rate", "accuracy": "accuracy on held-out pairs"},
        rows=[
            {"lr": f"{lr:g}", "accuracy": text + ", the best" * (lr == best)} for lr, text in shown.items()
        ],
    )
    rates = [{"lr": lr, "validation_accuracy": mean} for lr, mean in means.items()]
    results = {"name": stage.analysis, "best_lr": best, "rates": rates}
    write_analysis(attempt, stage.analysis, [table.markdown()], results=results)


if __name__ == "__main__":
    main(Grid(build=learning_rates, profiles=PROFILES, follow_up=declare), __file__, __doc__)
