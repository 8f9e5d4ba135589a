"""The paper's two theorems, checked in float64 (paper §5).

Theorem 1: for every β and δ there is a policy whose IM-RM tells right from wrong by the margin δ, and that is hardly ever
right itself. Theorem 2: on fixed hidden states an IM-RM learns nothing of tokens that it has not seen, while an EX-RM's
head turns towards the max-margin separator.

python sweeps/theory.py
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cli.analyses import Analyses, AnalysisOptions
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.studies import write_analysis
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt

# Raise when the analysis computes something else from the same parameters.
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The points of Theorem 1, with how often its reference is right, and the worlds of Theorem 2.

    A world has that many pairs of each, seen and unseen, with hidden states of that width.
    """

    betas: tuple[float, ...] = (0.01, 0.05, 0.1, 1.0)
    deltas: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    masses: tuple[float, ...] = (1e-12, 1e-6, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    pairs: int = 16
    width: int = 32


def declare(options: AnalysisOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis."""
    return [AnalyseStage(analysis="theory", version=VERSION, compute=compute, parameters=Parameters())]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Check both theorems, and say how far they hold."""
    from trainers.theory.theorems import theorem_1, theorem_2

    asked: Parameters = stage.parameters
    first = theorem_1(asked.betas, asked.deltas, asked.masses)
    second = [theorem_2(asked.pairs, asked.width, seed) for seed in asked.seeds]
    names = ("im_rm_unseen_accuracy", "ex_rm_unseen_accuracy", "separator_unseen_accuracy")
    # Of worlds it is the furthest, or the mean of accuracies.
    results = {
        "theorem_1_largest_margin_error": max(abs(row["margin"] / row["delta"] - 1) for row in first),
        "theorem_1_points_above_bound": sum(row["log_correct"] > row["log_bound"] for row in first),
        "theorem_1_points": len(first),
        "im_rm_largest_unseen_difference": max(row["im_rm_largest_unseen_difference"] for row in second),
        "ex_rm_cosine": min(row["ex_rm_cosine"] for row in second),
        **{name: statistics.mean(row[name] for row in second) for name in names},
    }
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
    rows = {"theorem_1": first, "theorem_2": second}
    write_analysis(attempt, "theory", paragraphs, results=results, rows=rows)


EXPERIMENT = Analyses(options=AnalysisOptions, declare=declare)
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
