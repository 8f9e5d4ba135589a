"""The paper's two theorems, checked in float64 (paper §5).

Theorem 1: for every β and δ there is a policy whose IM-RM tells right from wrong by the margin δ, and that is hardly ever
right itself. Theorem 2: on fixed hidden states an IM-RM learns nothing of tokens that it has not seen, while an EX-RM's
head turns towards the max-margin separator.

python sweeps/theory.py
python sweeps/theory.py --betas 0.01 0.1 --deltas 0.05 0.5 --seeds 0 1 2
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from orchestrator.cli.analyses import Analyses, AnalysisOptions
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.analysis_files import Rows, write_analysis
from orchestrator.report.house_style import GREY, panels
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.errors import SpecError

# Raise when the analysis computes something else from the same parameters.
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What the results depend on."""

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


@dataclass(frozen=True, kw_only=True)
class TheoryOptions(AnalysisOptions):
    """The paper's two theorems in numbers."""

    parameters: tyro.conf.OmitArgPrefixes[Parameters] = Parameters()


def declare(options: TheoryOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis."""
    asked = options.parameters
    for flag, values in (("--betas", asked.betas), ("--deltas", asked.deltas)):
        if not all(math.isfinite(value) and value > 0 for value in values) or not values:
            raise SpecError(f"{flag} {' '.join(map(str, values))}: give positive numbers.")
    if not all(0 < mass < 1 for mass in asked.masses) or not asked.masses:
        raise SpecError(f"--masses {' '.join(map(str, asked.masses))}: give probabilities inside (0, 1).")
    if not asked.seeds or asked.pairs < 1 or asked.width < 1:
        raise SpecError("--seeds, --pairs and --width: give at least one.")
    return [AnalyseStage(analysis="theory", version=VERSION, compute=compute, parameters=asked)]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Check both theorems, and say how far they hold."""
    from trainers.theory.theorems import checked

    asked: Parameters = stage.parameters
    results, rows = checked(**asdict(asked))
    first = rows["theorem_1"]
    seldom = [row for row in first if row["log_correct"] < math.log(1e-3)] or first
    rare = max(seldom, key=lambda row: row["delta"])
    paragraphs = [
        f"Theorem 1, {len(first)} points of β, δ and π_ref(C): the witness separates by δ up to a "
        f"relative error of {results['theorem_1_largest_margin_error']:.1e}; "
        f"{results['theorem_1_points_above_bound']} points are above the bound e^(δ/β) π_ref(C).",
        f"At β = {rare['beta']}, δ = {rare['delta']} every pair is ranked right and a correct response is "
        f"generated with probability {math.exp(rare['log_correct']):.2e}.",
        f"Theorem 2, {len(asked.seeds)} worlds of {asked.pairs} pairs in {asked.width} dimensions: of pairs of unseen tokens the IM-RM "
        f"ranks {results['im_rm_unseen_accuracy']:.3f} right, and its reward differences of them change by at most "
        f"{results['im_rm_largest_unseen_difference']:.1e}; the EX-RM ranks {results['ex_rm_unseen_accuracy']:.3f} right (the "
        f"max-margin separator: {results['separator_unseen_accuracy']:.3f}), and the cosine of its head with the separator is "
        f"{results['ex_rm_cosine']:.5f} at the least.",
    ]
    draw = {"theory": lambda: _draw(first, rows["descent"])}
    write_analysis(attempt, "theory", paragraphs, results=results, rows=rows, figures=draw)


def _draw(first: Rows, curves: Rows) -> Any:
    figure, (left, right) = panels(1, 2, 5.0, 4.0)
    for mass in dict.fromkeys(row["mass"] for row in first):
        rows = sorted(
            (row["delta"] / row["beta"], row["log_correct"], min(0.0, row["log_bound"]))
            for row in first
            if row["mass"] == mass
        )
        at, correct, bound = zip(*rows, strict=True)
        left.plot(at, correct, "o-", label=f"π_ref(C) = {mass:g}")
        left.plot(at, bound, ":", color=GREY)
    left.set(xscale="log", xlabel="δ/β", ylabel="ln π(C)", title="Theorem 1: margin δ, seldom correct")
    left.legend()
    for seed in dict.fromkeys(point["seed"] for point in curves):
        points = [(point["step"], 1 - point["cosine"]) for point in curves if point["seed"] == seed]
        right.plot(*zip(*points, strict=True), "o-", label=f"{seed}")
    right.set(xscale="log", yscale="log", xlabel="step", title="Theorem 2: EX-RM head")
    right.set_ylabel("1 − cos(u, separator)")
    right.legend(title="seed")
    return figure


EXPERIMENT = Analyses(options=TheoryOptions, declare=declare)
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
