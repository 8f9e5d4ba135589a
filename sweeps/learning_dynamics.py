"""Why an IM-RM follows tokens: one gradient step on one pair, predicted by the paper's formulas and measured (paper §5).

For each training pair: the change of r⁺ − r⁻ of unseen pairs, as the formula of each reward type has it and as it comes
out of the model, whose output layer (as the formulas have it) or whose every weight takes the step. Of the IM-RM's formula,
the part that is due to pairs of equal tokens stands apart.

python sweeps/learning_dynamics.py                                                a built-in tiny model in the tiny world
python sweeps/learning_dynamics.py --models PATH --train-set persona=FILE.jsonl --max-eval-pairs 20 --steps-on 2
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from orchestrator.cli.analyses import SEEN, Analyses, ModelOptions, declare_models, load_untrained
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.analysis_files import Rows, write_analysis
from orchestrator.report.house_style import GREY, panels
from orchestrator.report.tables import Table
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.errors import SpecError
from trainers.rewards import PAPER_BETA, RewardSpec

# Raise when the analysis computes something else from the same parameters.
VERSION = 1
KINDS = ("ex_rm", "im_rm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What the results depend on, beside model and pairs."""

    steps_on: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """Training pairs that a step is taken on, each from the same start."""
    step_size: Annotated[float, tyro.conf.arg(metavar="X")] = 1e-3
    """η of the step."""
    beta: Annotated[float, tyro.conf.arg(metavar="X")] = PAPER_BETA
    """β of the IM-RM."""


@dataclass(frozen=True, kw_only=True)
class DynamicsOptions(ModelOptions):
    """One gradient step on a pair, predicted and measured."""

    parameters: tyro.conf.OmitArgPrefixes[Parameters] = Parameters()


def declare(options: DynamicsOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis per model."""
    asked = options.parameters
    if asked.steps_on < 1:
        raise SpecError(f"--steps-on {asked.steps_on}: give at least 1.")
    for flag, value in (("--step-size", asked.step_size), ("--beta", asked.beta)):
        if not (math.isfinite(value) and value > 0):
            raise SpecError(f"{flag} {value}: give a positive number.")
    return declare_models(
        options, session, analysis="learning_dynamics", version=VERSION, compute=compute, parameters=asked
    )


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Predict and measure the change of every unseen pair by every step."""
    from trainers.theory.one_step import agreement, changes

    asked: Parameters = stage.parameters
    trained_on = inputs.pairs[SEEN][: asked.steps_on]
    unseen = {name: pairs for name, pairs in inputs.pairs.items() if name != SEEN}
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        spec = RewardSpec(kind=kind, beta=asked.beta if kind == "im_rm" else None)
        model = load_untrained(inputs, spec.type.output)
        found = changes(model, spec, trained_on, unseen, asked.step_size)
        rows += [{"reward": kind, **row} for row in found]
    results = {kind: {name: agreement(_some(rows, kind, name)) for name in unseen} for kind in KINDS}
    said = (
        f"One step of η = {asked.step_size:g} on each of {len(trained_on)} "
        "training pairs; the change of r⁺ − r⁻ of unseen pairs. Error: ‖measured − predicted‖ / ‖measured‖, the output layer "
        "alone taking the step. Rises: share of the pairs whose r⁺ − r⁻ rises."
    )
    write_analysis(
        attempt,
        inputs.name,
        [said, _table(results).markdown()],
        results=results,
        rows={"changes": rows},
        figures={"learning_dynamics": lambda: _draw(rows, list(unseen))},
    )


def _some(rows: Rows, kind: str, name: str) -> Rows:
    """The rows of one reward type and set."""
    return [row for row in rows if (row["reward"], row["set"]) == (kind, name)]


def _table(results: dict[str, Any]) -> Table:
    return Table(
        name="errors",
        title="",
        columns="reward set relative_error predicted_to_rise rises rises_all_weights correlation_all_weights share_of_token_matches",
        titles={
            "reward": "",
            "set": "unseen set",
            "relative_error": "error",
            "rises_all_weights": "rises, all weights",
            "correlation_all_weights": "correlation, all weights",
        },
        rows=[
            {"reward": kind, "set": name, **found}
            for kind, sets in results.items()
            for name, found in sets.items()
        ],
        forms={"relative_error": ".1e"},
    )


def _draw(rows: Rows, names: Sequence[str]) -> Any:
    figure, axes = panels(1, 3, 5.0, 4.0)
    for axis, kind in zip(axes, KINDS, strict=False):
        for name in names:
            some = _some(rows, kind, name)
            predicted, measured = ([row[what] for row in some] for what in ("predicted", "measured"))
            axis.scatter(predicted, measured, s=8, label=name)
        axis.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
        axis.set(xlabel="predicted change of r⁺ − r⁻", ylabel="measured", title=kind)
        axis.legend()
    for offset, part in ((-0.2, "token_matches"), (0.2, "other_tokens")):
        values = [[row[part] for row in _some(rows, "im_rm", name)] for name in names]
        places = [place + offset for place in range(len(names))]
        means = [sum(some) / len(some) for some in values]
        axes[2].bar(places, means, width=0.4, label=part.replace("_", " "))
    axes[2].axhline(0, color=GREY, linewidth=0.8)
    axes[2].set_xticks(range(len(names)), names, rotation=15)
    axes[2].set(title="im_rm: mean predicted change by tokens")
    axes[2].legend()
    return figure


if __name__ == "__main__":
    main(Analyses(options=DynamicsOptions, declare=declare), __file__, __doc__)
