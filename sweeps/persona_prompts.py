"""Is it the prompts or the responses that an IM-RM does not generalise to? Two by two, from the scores of sweeps/persona.py.

                    original responses            paraphrased responses
training prompts    what was trained on           the same prompts, new responses
test prompts        new prompts, same responses   both new

The original responses are few and stand in training with other prompts, so the row below changes prompts alone. Nothing is
trained: accuracies of the last epoch, over prompts and seeds; a prompt's pairs count as one.

python sweeps/persona_prompts.py                       of the sweep persona in this storage
python sweeps/persona_prompts.py --sweep NAME
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from orchestrator.cli.analyses import Analyses, ScoredOptions, declare_scored
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.analysis_files import Rows, write_analysis
from orchestrator.report.house_style import legend, panels, points
from orchestrator.report.results import TrialResult, by_seeds, results_of
from orchestrator.report.statistics import Floats, over_seeds, right
from orchestrator.report.tables import Table, interval, reward_title
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt, Store
from sweeps.persona import ON_TRAINING_PROMPTS
from trainers.errors import DataError

# Raise when the analysis computes something else from the same scores.
VERSION = 3
CELLS = ("seen", "new_prompts", "new_responses", "both_new")
CONTRAST = "prompts_over_responses"


@dataclass(frozen=True, kw_only=True)
class PersonaPromptsOptions(ScoredOptions):
    """New prompts against new responses."""

    sweep: Annotated[str, tyro.conf.arg(metavar="NAME")] = "persona"
    """The sweep in the same storage whose scores are read."""


def declare(options: PersonaPromptsOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis of the sweep."""
    return declare_scored(options, session, analysis="persona_prompts", version=VERSION, compute=compute)


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """A two by two table for every model, reward type and rewriting."""
    results, basis = results_of(stage.parameters, inputs.store)
    rows = [
        _row(trials, rewritten, inputs.store)
        for trials in by_seeds([item for item in results if item.learned])
        for rewritten in _rewritings(trials[0])
    ]
    if not rows:
        raise DataError(
            "no trial of this sweep has learned and was evaluated on training and test prompts with original and "
            "rewritten responses; run sweeps/persona.py."
        )
    write_analysis(
        attempt,
        "persona_prompts",
        [basis, *map(_sentence, rows)],
        (_table(rows),),
        results={"cells": rows},
        figures={"persona_prompts": lambda: _draw(rows)},
    )


def _sets(train_set: str, rewritten: str) -> dict[str, str]:
    """The evaluation set of each cell."""
    names = (f"{train_set}{ON_TRAINING_PROMPTS}", train_set, f"{rewritten}{ON_TRAINING_PROMPTS}", rewritten)
    return dict(zip(CELLS, names, strict=True))


def _rewritings(trial: TrialResult) -> list[str]:
    """The rewritings that are evaluated on test and training prompts, as the training set itself is."""
    known = {item.dataset: item.category for item in trial.final}
    return [
        name
        for name, category in known.items()
        if category == "token-level shift" and set(_sets(trial.record.train_set, name).values()) <= set(known)
    ]


def _row(trials: Sequence[TrialResult], rewritten: str, store: Store) -> dict[str, Any]:
    """Accuracies of one model and reward type, and what new prompts leave of it over what new responses leave."""
    record = trials[0].record
    row: dict[str, Any] = {
        "train_set": record.train_set,
        "model": record.model,
        "reward": record.reward,
        "rewriting": rewritten,
        "seeds": len(trials),
    }
    right_of = {
        cell: np.stack([_by_prompt(trial, dataset, store) for trial in trials])
        for cell, dataset in _sets(record.train_set, rewritten).items()
    }
    row |= {cell: over_seeds(right_SQ) for cell, right_SQ in right_of.items()}
    row[CONTRAST] = over_seeds(right_of["new_prompts"], right_of["new_responses"])
    return row


def _by_prompt(trial: TrialResult, dataset: str, store: Store) -> Floats:
    """The accuracy on each prompt's pairs, in the order in which prompts first stand in the set."""
    result = next(item for item in trial.final if item.dataset == dataset)
    pairs, scores = pairs_of(store, result.dataset_digest), result.scores
    # Without the rows every pair is taken for a prompt of its own.
    asked = [pairs[row].prompt if pairs else row for row in scores.index]
    numbers: dict[Any, int] = {}
    prompt_P = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in asked])
    return np.bincount(prompt_P, right(scores.chosen, scores.rejected)) / np.bincount(prompt_P)


def _sentence(row: dict[str, Any]) -> str:
    gap, seen = row[CONTRAST], row["seen"].value
    if gap.low > 0:
        answer = "new responses cost more than new prompts"
    elif gap.high < 0:
        answer = "new prompts cost more than new responses"
    else:
        answer = "new prompts and new responses cost the same, as far as can be told"
    return (
        f"{row['model']}, {reward_title(row['reward'])}, {row['rewriting']}: {answer} ({interval(gap)}); "
        f"new prompts alone change its accuracy by {row['new_prompts'].value - seen:+.3f}, "
        f"new responses alone by {row['new_responses'].value - seen:+.3f}."
    )


def _table(rows: Rows) -> Table:
    return Table(
        name="persona_prompts",
        title="New prompts and new responses",
        note="Accuracy after the last epoch, mean over seeds ± their standard deviation, 95 % intervals over prompts and seeds. "
        "The last column is new prompts with the same responses minus new responses on the same prompts.",
        columns=f"model reward rewriting seeds seen new_prompts new_responses both_new {CONTRAST}",
        titles={
            "seen": "training prompts, original responses",
            "new_prompts": "test prompts, original responses",
            "new_responses": "training prompts, new responses",
            "both_new": "test prompts, new responses",
            CONTRAST: "difference",
        },
        rows=[{**row, "reward": reward_title(row["reward"])} for row in rows],
        forms={CONTRAST: "+.3f"},
    )


def _draw(rows: Rows) -> Any:
    """A panel per model and rewriting: original responses left, new ones right, test prompts hollow."""
    where = list(dict.fromkeys((row["model"], row["rewriting"]) for row in rows))
    kinds = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = panels(1, len(where), 3.6, 2.8)
    for axis, place in zip(axes, where, strict=True):
        for number, row in enumerate(row for row in rows if (row["model"], row["rewriting"]) == place):
            kind, title = row["reward"], reward_title(row["reward"])
            at = [left + 0.2 * number for left in (0, 1)]
            seen, new = ([row[name] for name in names] for names in (CELLS[::2], CELLS[1::2]))
            points(axis, at, seen, kind, kinds, label=f"{title}, training prompts")
            beside = [left + 0.1 for left in at]
            points(axis, beside, new, kind, kinds, label=f"{title}, test prompts", markerfacecolor="white")
        axis.set_xticks([0.15, 1.15], ["original responses", "new responses"])
        axis.set_ylim(-0.05, 1.05)
        axis.set_title(" · ".join(place))
    axes[0].set_ylabel("accuracy")
    legend(figure, axes, columns=1)
    return figure


if __name__ == "__main__":
    main(Analyses(options=PersonaPromptsOptions, declare=declare), __file__, __doc__)
