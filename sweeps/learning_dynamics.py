"""Why an IM-RM follows tokens: one gradient step on one pair, predicted by the paper's formulas and measured (paper §5).

For each training pair: the change of r⁺ − r⁻ of unseen pairs, as the formula of each reward type has it and as it comes
out of the model, whose output layer (as the formulas have it) or whose every weight takes the step. Of the IM-RM's formula,
the part that is due to pairs of equal tokens stands apart.

python sweeps/learning_dynamics.py                                                a built-in tiny model in the tiny world
python sweeps/learning_dynamics.py --models PATH --train-set persona=FILE.jsonl --max-eval-pairs 20 --steps-on 2
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from orchestrator.cli.analyses import SEEN, Analyses, ModelOptions, declare_models, load_untrained
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.house_style import write_figure
from orchestrator.report.tables import Table, write_summary
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.errors import SpecError
from trainers.rewards import PAPER_BETA

# Raise when the analysis computes something else from the same parameters.
VERSION = 1
KINDS = ("ex_rm", "im_rm")


@dataclass(frozen=True, kw_only=True)
class DynamicsOptions(ModelOptions):
    """One gradient step on a pair, predicted and measured."""

    steps_on: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """Training pairs that a step is taken on, each from the same start."""
    step_size: Annotated[float, tyro.conf.arg(metavar="X")] = 1e-3
    """η of the step."""
    beta: Annotated[float, tyro.conf.arg(metavar="X")] = PAPER_BETA
    """β of the IM-RM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What the results depend on, beside model and pairs."""

    steps_on: int
    step_size: float
    beta: float


def declare(options: DynamicsOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis per model."""
    if options.steps_on < 1:
        raise SpecError(f"--steps-on {options.steps_on}: give at least 1.")
    for flag, value in (("--step-size", options.step_size), ("--beta", options.beta)):
        if not (math.isfinite(value) and value > 0):
            raise SpecError(f"{flag} {value}: give a positive number.")
    parameters = Parameters(steps_on=options.steps_on, step_size=options.step_size, beta=options.beta)
    return declare_models(
        options, session, analysis="learning_dynamics", version=VERSION, parameters=parameters
    )


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Predictions and measurements of every pair, with their summary and figure."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [row for kind in KINDS for row in _rows(kind, inputs, stage.parameters)]
    parquet.write_table(pa.Table.from_pylist(rows), attempt.directory / "changes.parquet")
    results = {
        kind: {
            name: _statistics([row for row in rows if (row["reward"], row["set"]) == (kind, name)])
            for name in inputs.pairs
            if name != SEEN
        }
        for kind in KINDS
    }
    (attempt.directory / "results.json").write_text(json.dumps(results, indent=1))
    paragraphs = [
        f"One step of η = {stage.parameters.step_size:g} on each of {min(stage.parameters.steps_on, len(inputs.pairs[SEEN]))} "
        "training pairs; the change of r⁺ − r⁻ of unseen pairs. Error: ‖measured − predicted‖ / ‖measured‖, the output layer "
        "alone taking the step. Rises: share of the pairs whose r⁺ − r⁻ rises.",
        _table(results).markdown(),
    ]
    write_summary(attempt.directory, inputs.name, paragraphs)
    write_figure(attempt.directory, "learning_dynamics", lambda: _draw(rows, list(results["im_rm"])))
    attempt.info.update(results=results)


def _rows(kind: str, inputs: AnalysisInputs, parameters: Parameters) -> list[dict[str, Any]]:
    from trainers.models.loading import freeze
    from trainers.models.reward_parts import RewardModule
    from trainers.rewards import RewardSpec
    from trainers.theory.one_step import margins, stepped
    from trainers.theory.states import pair_states, plain_unembedding

    spec = RewardSpec(kind=kind, beta=parameters.beta if kind == "im_rm" else None)
    model = load_untrained(inputs, spec.type.output)
    # Tied, the embeddings would take the step as well, and hidden states with them.
    freeze(model, ("backbone",))
    reward = RewardModule(model, spec)
    layer = model.score if kind == "ex_rm" else model.get_output_embeddings()
    unembedding_VD = plain_unembedding(model) if kind == "im_rm" else None
    unseen = {name: pairs for name, pairs in inputs.pairs.items() if name != SEEN}
    states = {name: pair_states(model, pairs) for name, pairs in unseen.items()}
    before = margins(reward, unseen)
    rows = []
    for pair in inputs.pairs[SEEN][: parameters.steps_on]:
        (trained,) = pair_states(model, [pair])
        with stepped(reward, pair, [layer.weight], parameters.step_size) as pull:
            measured = margins(reward, unseen)
        with stepped(reward, pair, list(model.parameters()), parameters.step_size):
            everything = margins(reward, unseen)
        scale = {"weight": pull, "step_size": parameters.step_size}
        for name, pairs in unseen.items():
            parts = _predicted(states[name], trained, unembedding_VD, parameters.beta, scale)
            rows += [
                {
                    "reward": kind,
                    "trained_on": pair.index,
                    "set": name,
                    "index": other.index,
                    "predicted": sum(found),
                    "token_matches": found[0] if kind == "im_rm" else None,
                    "other_tokens": found[1] if kind == "im_rm" else None,
                    "measured": float(measured[name][place] - before[name][place]),
                    "measured_all_weights": float(everything[name][place] - before[name][place]),
                }
                for place, (other, found) in enumerate(zip(pairs, parts, strict=True))
            ]
    return rows


def _predicted(
    states: Sequence[Any], trained: Any, unembedding_VD: Any, beta: float, scale: dict[str, float]
) -> list[tuple[float, float]]:
    """Change of r⁺ − r⁻ of each pair: the parts from equal and from different tokens; an EX-RM's is one, the second."""
    from trainers.theory.dynamics import explicit_change, implicit_change, tokens_of

    if unembedding_VD is None:
        return [
            (
                0.0,
                explicit_change(
                    item.chosen_D - item.rejected_D, trained.chosen_D, trained.rejected_D, **scale
                ),
            )
            for item in states
        ]
    pulls, pushes = (
        tokens_of(unembedding_VD, *tokens) for tokens in (trained.chosen_tokens, trained.rejected_tokens)
    )
    found = []
    for item in states:
        chosen, rejected = (
            implicit_change(tokens_of(unembedding_VD, *tokens), pulls, pushes, beta=beta, **scale)
            for tokens in (item.chosen_tokens, item.rejected_tokens)
        )
        found.append((chosen.matches - rejected.matches, chosen.others - rejected.others))
    return found


def _statistics(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    import numpy as np

    predicted, measured, everything = (
        np.array([row[name] for row in rows]) for name in ("predicted", "measured", "measured_all_weights")
    )
    error = np.linalg.norm(measured - predicted) / np.linalg.norm(measured)
    found: dict[str, float | None] = {
        "n": float(len(rows)),
        "relative_error": float(error),
        "predicted_to_rise": float(np.mean(predicted > 0)),
        "rises": float(np.mean(measured > 0)),
        "rises_all_weights": float(np.mean(everything > 0)),
        "correlation_all_weights": None,
        "share_of_token_matches": None,
    }
    if len(rows) > 1 and predicted.std() > 0 and everything.std() > 0:
        found["correlation_all_weights"] = float(np.corrcoef(predicted, everything)[0, 1])
    if rows[0]["token_matches"] is not None:
        matches, others = (
            np.abs([row[name] for row in rows]).sum() for name in ("token_matches", "other_tokens")
        )
        found["share_of_token_matches"] = float(matches / (matches + others))
    return found


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


def _draw(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    from orchestrator.report.house_style import GREY, panels

    figure, axes = panels(1, 3, 5.0, 4.0)
    for axis, kind in zip(axes, KINDS, strict=False):
        for name in names:
            points = [row for row in rows if (row["reward"], row["set"]) == (kind, name)]
            axis.scatter(
                [row["predicted"] for row in points], [row["measured"] for row in points], s=8, label=name
            )
        axis.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
        axis.set(xlabel="predicted change of r⁺ − r⁻", ylabel="measured", title=kind)
        axis.legend()
    for offset, part in ((-0.2, "token_matches"), (0.2, "other_tokens")):
        means = []
        for name in names:
            values = [row[part] for row in rows if (row["reward"], row["set"]) == ("im_rm", name)]
            means.append(sum(values) / len(values))
        places = [place + offset for place in range(len(names))]
        axes[2].bar(places, means, width=0.4, label=part.replace("_", " "))
    axes[2].axhline(0, color=GREY, linewidth=0.8)
    axes[2].set_xticks(range(len(names)), names, rotation=15)
    axes[2].set(title="im_rm: mean predicted change by tokens")
    axes[2].legend()
    return figure


if __name__ == "__main__":
    main(Analyses(options=DynamicsOptions, declare=declare, compute=compute), __file__, __doc__)
