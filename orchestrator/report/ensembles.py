"""Ensembles: the mean reward of all seeds of a model, reward type and training set, from the stored scores."""

from collections.abc import Sequence

import numpy as np

from orchestrator.report.results import TrialResult, by_seeds, on_common_pairs
from orchestrator.report.tables import Table, Value, reward_title
from trainers.evaluate.metrics import accuracy, ensemble


def ensemble_table(results: Sequence[TrialResult]) -> Table:
    """Return for each evaluation set the accuracy of the seeds' mean reward, beside the accuracy of single seeds.

    Trials that did not learn are left out; a row needs two seeds.
    """
    rows: list[dict[str, Value]] = []
    for trials in by_seeds([item for item in on_common_pairs(results) if item.learned]):
        sets = [{item.dataset: item for item in trial.final} for trial in trials]
        for name in sets[0]:
            scores = [of_seed[name].scores for of_seed in sets if name in of_seed]
            if len(scores) < 2:
                continue
            rewards = ([item.chosen for item in scores], [item.rejected for item in scores])
            together, record = ensemble(*map(np.stack, rewards)), trials[0].record
            numbers = together.summary
            row: dict[str, Value] = {
                "train_set": record.train_set,
                "evaluation_set": name,
                "model": record.model,
                "reward": reward_title(record.reward),
                "seeds": len(scores),
                "accuracy": accuracy(together.chosen, together.rejected),
            }
            rows.append({**row, **{key: numbers[key] for key in _TITLES if key in numbers}})
    return Table(
        name="ensembles",
        title="Ensembles of all seeds",
        note="A seed's rewards enter the mean as they are; the spread of margins is their standard deviation over seeds.",
        columns=" ".join(("train_set evaluation_set model reward seeds", *_TITLES)),
        titles=_TITLES,
        rows=sorted(rows, key=lambda row: (str(row["train_set"]), str(row["evaluation_set"]))),
    )


_TITLES = {
    "accuracy": "accuracy of the mean",
    "accuracy_alone": "of a seed alone",
    "accuracy_spread": "± over seeds",
    "margin_spread": "spread of margins",
}
