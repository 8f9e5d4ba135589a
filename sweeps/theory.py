"""The paper's two theorems, checked in float64 (paper §5).

Theorem 1: for every β and δ there is a policy whose IM-RM tells right from wrong by the margin δ, and that is hardly ever
right itself. Theorem 2: on fixed hidden states an IM-RM learns nothing of tokens that it has not seen, while an EX-RM's
head turns towards the max-margin separator.

python sweeps/theory.py
python sweeps/theory.py --betas 0.01 0.1 --deltas 0.05 0.5 --seeds 0 1 2
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from orchestrator.cli.analyses import Analyses, AnalysisOptions
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.house_style import write_figure
from orchestrator.report.tables import Table, write_summary
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.errors import SpecError

# Raise when the analysis computes something else from the same parameters.
VERSION = 1
IMPLICIT_BETA, IMPLICIT_STEPS, STEP_SIZE = 0.5, 300, 5.0
LOOKED_AT = (10, 30, 100, 300, 1000, 3000, 10_000)


@dataclass(frozen=True, kw_only=True)
class TheoryOptions(AnalysisOptions):
    """The paper's two theorems in numbers."""

    betas: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X")] = (0.01, 0.05, 0.1, 1.0)
    """β of Theorem 1's IM-RM."""
    deltas: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X")] = (0.001, 0.01, 0.1, 1.0)
    """Margins of Theorem 1."""
    masses: Annotated[tuple[float, ...], tyro.conf.arg(metavar="P")] = (1e-12, 1e-6, 1e-2)
    """How often Theorem 1's reference is right."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = (0, 1, 2, 3, 4)
    """Worlds of Theorem 2."""
    pairs: int = 16
    """Pairs of each, seen and unseen."""
    width: int = 32
    """Width of their hidden states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What the results depend on."""

    betas: tuple[float, ...]
    deltas: tuple[float, ...]
    masses: tuple[float, ...]
    seeds: tuple[int, ...]
    pairs: int
    width: int
    responses: int = 500
    correct: int = 10
    words: int = 2
    polarity: float = 1.0
    noise: float = 0.5


def declare(options: TheoryOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis."""
    for flag, values in (("--betas", options.betas), ("--deltas", options.deltas)):
        if not all(math.isfinite(value) and value > 0 for value in values) or not values:
            raise SpecError(f"{flag} {' '.join(map(str, values))}: give positive numbers.")
    if not all(0 < mass < 1 for mass in options.masses) or not options.masses:
        raise SpecError(f"--masses {' '.join(map(str, options.masses))}: give probabilities inside (0, 1).")
    if not options.seeds or options.pairs < 1 or options.width < 1:
        raise SpecError("--seeds, --pairs and --width: give at least one.")
    parameters = Parameters(
        betas=options.betas,
        deltas=options.deltas,
        masses=options.masses,
        seeds=options.seeds,
        pairs=options.pairs,
        width=options.width,
    )
    return [AnalyseStage(analysis="theory", version=VERSION, parameters=parameters)]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Both theorems, with tables, figure and summary."""
    import pyarrow as pa
    from pyarrow import parquet

    parameters: Parameters = stage.parameters
    first, second = _theorem_1(parameters), [_theorem_2(parameters, seed) for seed in parameters.seeds]
    curves = [{"seed": row["seed"], **point} for row in second for point in row.pop("curve")]
    for name, rows in (("theorem_1", first), ("theorem_2", second), ("descent", curves)):
        parquet.write_table(pa.Table.from_pylist(rows), attempt.directory / f"{name}.parquet")
    results = {
        "theorem_1_largest_margin_error": max(abs(row["margin"] / row["delta"] - 1) for row in first),
        "theorem_1_points_above_bound": sum(row["log_correct"] > row["log_bound"] for row in first),
        "theorem_1_points": len(first),
        "im_rm_largest_unseen_difference": max(row["im_rm_largest_unseen_difference"] for row in second),
        "im_rm_unseen_accuracy": _mean(row["im_rm_unseen_accuracy"] for row in second),
        "ex_rm_cosine": min(row["ex_rm_cosine"] for row in second),
        "ex_rm_unseen_accuracy": _mean(row["ex_rm_unseen_accuracy"] for row in second),
        "separator_unseen_accuracy": _mean(row["separator_unseen_accuracy"] for row in second),
    }
    (attempt.directory / "results.json").write_text(json.dumps(results, indent=1))
    write_summary(attempt.directory, "theory", _summary(results, first, parameters))
    write_figure(attempt.directory, "theory", lambda: _draw(first, curves, parameters))
    attempt.info.update(results=results)


def _theorem_1(parameters: Parameters) -> list[dict[str, Any]]:
    import torch

    from trainers.theory.theorems import verification, witness

    generator = torch.Generator().manual_seed(0)
    correct_N = torch.arange(parameters.responses) < parameters.correct
    rows = []
    for mass in parameters.masses:
        log_reference_N = torch.randn(parameters.responses, generator=generator, dtype=torch.float64)
        for members_N, share in ((correct_N, mass), (~correct_N, 1 - mass)):
            log_reference_N[members_N] += math.log(share) - torch.logsumexp(log_reference_N[members_N], 0)
        for beta in parameters.betas:
            for delta in parameters.deltas:
                policy_N = witness(log_reference_N, correct_N, beta=beta, delta=delta)
                found = verification(policy_N, log_reference_N, correct_N, beta=beta, delta=delta)
                rows.append({"beta": beta, "delta": delta, "mass": mass, **asdict(found)})
    return rows


def _theorem_2(parameters: Parameters, seed: int) -> dict[str, Any]:
    from trainers.theory import theorems
    from trainers.theory.representations import separator

    world = theorems.single_token_world(
        pairs=parameters.pairs,
        width=parameters.width,
        words=parameters.words,
        polarity=parameters.polarity,
        noise=parameters.noise,
        seed=seed,
    )
    difference_P, loss = theorems.descend_implicit(
        world, beta=IMPLICIT_BETA, steps=IMPLICIT_STEPS, step_size=STEP_SIZE, seed=seed
    )
    descent = theorems.descend_explicit(world.seen.difference_PD, steps=LOOKED_AT, step_size=0.5)
    best_D = separator(world.seen.difference_PD)
    curve = zip(descent.steps, descent.cosines, descent.log_losses, strict=True)
    return {
        "seed": seed,
        "im_rm_training_loss": loss,
        "im_rm_largest_unseen_difference": float(difference_P.abs().max()),
        "im_rm_unseen_accuracy": theorems.ranked_right(difference_P),
        "ex_rm_log_training_loss": descent.log_losses[-1],
        "ex_rm_cosine": descent.cosines[-1],
        "ex_rm_unseen_accuracy": theorems.ranked_right(world.unseen.difference_PD @ descent.head_D),
        "separator_unseen_accuracy": theorems.ranked_right(world.unseen.difference_PD @ best_D),
        "curve": [{"step": step, "cosine": cosine, "log_loss": after} for step, cosine, after in curve],
    }


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))


def _summary(results: dict[str, float], first: list[dict[str, Any]], parameters: Parameters) -> list[str]:
    seldom = [row for row in first if row["log_correct"] < math.log(1e-3)] or first
    rare = max(seldom, key=lambda row: row["delta"])
    explicit = (
        f"{results['ex_rm_unseen_accuracy']:.3f} (the separator: {results['separator_unseen_accuracy']:.3f})"
    )
    rows = (
        ("accuracy on pairs of unseen tokens", f"{results['im_rm_unseen_accuracy']:.3f}", explicit),
        (
            "largest change of their reward difference",
            f"{results['im_rm_largest_unseen_difference']:.1e}",
            "",
        ),
        ("cosine of the head with the max-margin separator, least", "", f"{results['ex_rm_cosine']:.5f}"),
    )
    shown = [dict(zip(("what", "im_rm", "ex_rm"), row, strict=True)) for row in rows]
    return [
        f"Theorem 1, {results['theorem_1_points']:.0f} points of β, δ and π_ref(C): the witness separates by δ up to a "
        f"relative error of {results['theorem_1_largest_margin_error']:.1e}; "
        f"{results['theorem_1_points_above_bound']:.0f} points are above the bound e^(δ/β) π_ref(C).",
        f"At β = {rare['beta']}, δ = {rare['delta']} every pair is ranked right and a correct response is "
        f"generated with probability {math.exp(rare['log_correct']):.2e}.",
        f"Theorem 2, {len(parameters.seeds)} worlds of {parameters.pairs} pairs in {parameters.width} dimensions:",
        Table(
            name="theorem_2", title="", columns="what im_rm ex_rm", rows=shown, titles={"what": ""}
        ).markdown(),
    ]


def _draw(first: list[dict[str, Any]], curves: list[dict[str, Any]], parameters: Parameters) -> Any:
    from orchestrator.report.house_style import GREY, panels

    figure, (left, right) = panels(1, 2, 5.0, 4.0)
    for mass in parameters.masses:
        rows = sorted(
            (row for row in first if row["mass"] == mass), key=lambda row: row["delta"] / row["beta"]
        )
        ratio = [row["delta"] / row["beta"] for row in rows]
        left.plot(ratio, [row["log_correct"] for row in rows], "o-", label=f"π_ref(C) = {mass:g}")
        left.plot(ratio, [min(0.0, row["log_bound"]) for row in rows], ":", color=GREY)
    left.set(xscale="log", xlabel="δ/β", ylabel="ln π(C)", title="Theorem 1: margin δ, seldom correct")
    left.legend()
    for seed in parameters.seeds:
        points = [row for row in curves if row["seed"] == seed]
        right.plot(
            [row["step"] for row in points], [1 - row["cosine"] for row in points], "o-", label=f"{seed}"
        )
    right.set(
        xscale="log",
        yscale="log",
        xlabel="step",
        ylabel="1 − cos(u, separator)",
        title="Theorem 2: EX-RM head",
    )
    right.legend(title="seed")
    return figure


if __name__ == "__main__":
    main(Analyses(options=TheoryOptions, declare=declare, compute=compute), __file__, __doc__)
