"""Accuracies of groups of evaluations with intervals, for analyses of a sweep: over test pairs and seeds."""

from collections.abc import Sequence

import numpy as np

from orchestrator.report.statistics import (
    DRAWS,
    Estimate,
    accuracy_estimate,
    generator,
    pair_counts,
    right,
    seed_weights,
)
from orchestrator.spec.stages import EvaluateStage
from orchestrator.store.artifacts import Store
from trainers.scores import read_pair_scores


def seeds_accuracy(evaluations: Sequence[EvaluateStage], store: Store) -> Estimate:
    """Mean accuracy of trainings that differ in their seed, all evaluated on one set, with its 95 % interval."""
    scores = [
        read_pair_scores(store.read_file("evaluate", stage.key, "scores.parquet")) for stage in evaluations
    ]
    right_SP = np.stack([right(item.chosen, item.rejected) for item in scores])
    seeds, pairs = right_SP.shape
    prepared = evaluations[0].prepared.key
    counts_BP = pair_counts(pairs, DRAWS, generator("pairs", prepared))
    weights_BS = seed_weights(seeds, DRAWS, generator("seeds", str(seeds)))
    draws_B = np.einsum("bs,sb->b", weights_BS, right_SP @ counts_BP.T / pairs)
    by_seed = [float(value) for value in right_SP.mean(axis=1)]
    return accuracy_estimate(float(np.mean(by_seed)), draws_B, pairs, by_seed)
