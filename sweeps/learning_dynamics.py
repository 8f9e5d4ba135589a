"""Why an IM-RM follows tokens: one gradient step on one pair, predicted by the paper's formulas and measured (paper §5).

For each training pair: the change of r⁺ − r⁻ of unseen pairs, predicted by the formula of each reward type, and measured
when the output layer (as in the formulas) or every weight takes the step. The part of the IM-RM's formula that is due to
pairs of equal tokens is shown separately.

python sweeps/learning_dynamics.py                                                a built-in tiny model in the tiny world
python sweeps/learning_dynamics.py --models PATH --train-set persona=FILE.jsonl --max-eval-pairs 20 --max-train-pairs 2
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.cli.analyses import SEEN, analyses_of_untrained, load_untrained
from orchestrator.cli.main import main
from orchestrator.report.house_style import GREY, panels
from orchestrator.report.studies import Rows, write_analysis
from orchestrator.report.tables import Table
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.rewards import PAPER_BETA, RewardSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How many training pairs a step is taken on, each from the same start; η of the step; β of the IM-RM."""

    steps_on: int = 4
    step_size: float = 1e-3
    beta: float = PAPER_BETA


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Predict and measure the change of every unseen pair by every step."""
    from trainers.theory.dynamics import agreement, changes

    asked: Parameters = stage.parameters
    trained_on = inputs.pairs[SEEN][: asked.steps_on]
    unseen = {name: pairs for name, pairs in inputs.pairs.items() if name != SEEN}
    step, kinds = asked.step_size, (RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=asked.beta))
    rows = [
        {"reward": spec.kind, **row}
        for spec in kinds
        for row in changes(load_untrained(inputs, spec.type.output), spec, trained_on, unseen, step)
    ]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["reward"], row["set"]), []).append(row)
    results = {spec.kind: {name: agreement(found[spec.kind, name]) for name in unseen} for spec in kinds}
    said = (
        f"One step of η = {step:g} on each of {len(trained_on)} training pairs; the change of r⁺ − r⁻ of unseen pairs. "
        "Error: ‖measured − predicted‖ / ‖measured‖, the output layer alone taking the step. Rises: share of the pairs whose r⁺ − r⁻ rises."
    )
    table = Table(
        name="errors",
        title="",
        columns="reward set relative_error predicted_to_rise rises rises_all_weights correlation_all_weights share_of_token_matches",
        titles={"set": "unseen set", "relative_error": "error"},
        rows=[{"reward": kind, "set": name, **results[kind][name]} for kind, name in found],
        forms={"relative_error": ".1e"},
    )
    shown, figures = [said, table.markdown()], {"learning_dynamics": lambda: _draw(found, list(unseen))}
    write_analysis(attempt, inputs.name, shown, results=results, rows={"changes": rows}, figures=figures)


def _draw(found: Mapping[tuple[str, str], Rows], names: Sequence[str]) -> Any:
    figure, axes = panels(3, 3, 5.0, 4.0)
    for axis, kind in zip(axes, ("ex_rm", "im_rm"), strict=False):
        for name in names:
            predicted, measured = (
                [row[what] for row in found[kind, name]] for what in ("predicted", "measured")
            )
            axis.scatter(predicted, measured, s=8, label=name)
        axis.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
        axis.set(xlabel="predicted change of r⁺ − r⁻", ylabel="measured", title=kind)
        axis.legend()
    for offset, part in ((-0.2, "token_matches"), (0.2, "other_tokens")):
        places = [place + offset for place in range(len(names))]
        means = [statistics.mean(row[part] for row in found["im_rm", name]) for name in names]
        axes[2].bar(places, means, width=0.4, label=part.replace("_", " "))
    axes[2].axhline(0, color=GREY, linewidth=0.8)
    axes[2].set_xticks(range(len(names)), names, rotation=15)
    axes[2].set(title="im_rm: mean predicted change by tokens")
    axes[2].legend()
    return figure


# Raise the version when the analysis computes something else from the same parameters.
EXPERIMENT = analyses_of_untrained("learning_dynamics", 1, compute, Parameters())
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
