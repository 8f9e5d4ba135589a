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
from typing import Any

import numpy as np

from orchestrator.cli.analyses import analyses_of
from orchestrator.cli.main import main
from orchestrator.report.results import TrialResult
from orchestrator.report.statistics import over_seeds
from orchestrator.report.studies import Findings, Rows, Study, learned_cells, right_by_prompt, titled
from orchestrator.report.tables import Table, interval, reward_title
from orchestrator.spec.stages import AnalysisInputs
from sweeps.persona import ON_TRAINING_PROMPTS
from trainers.errors import DataError

CELLS = {
    "seen": "training prompts, original responses",
    "new_prompts": "test prompts, original responses",
    "new_responses": "training prompts, new responses",
    "both_new": "test prompts, new responses",
}
CONTRAST = "prompts_over_responses"


def find(results: Sequence[TrialResult], inputs: AnalysisInputs) -> Findings:
    """A two by two table for every model, reward type and rewriting."""
    rows: list[dict[str, Any]] = []
    for labels, trials in learned_cells(results):
        train_set, known = labels["train_set"], {item.dataset: item.category for item in trials[0].final}
        for rewritten, category in known.items():
            sets = [f"{name}{end}" for name in (train_set, rewritten) for end in (ON_TRAINING_PROMPTS, "")]
            if category != "token-level shift" or not known.keys() >= set(sets):
                continue
            right_of = [np.stack([right_by_prompt(trial, name) for trial in trials]) for name in sets]
            cells = dict(zip(CELLS, map(over_seeds, right_of), strict=True))
            # Accuracy on new prompts less accuracy on new responses.
            contrast = over_seeds(right_of[1], right_of[2])
            rows.append({**labels, "rewriting": rewritten, **cells, CONTRAST: contrast})
    if not rows:
        raise DataError(
            "no trial of this sweep has learned and was evaluated on training and test prompts with original and "
            "rewritten responses; run sweeps/persona.py."
        )
    return Findings(
        said=list(map(_sentence, rows)),
        tables=(_table(rows),),
        results={"cells": rows},
    )


def _sentence(row: dict[str, Any]) -> str:
    gap = row[CONTRAST]
    if gap.low > 0:
        answer = "new responses cost more than new prompts"
    elif gap.high < 0:
        answer = "new prompts cost more than new responses"
    else:
        answer = "new prompts and new responses cost the same, as far as can be told"
    return f"{row['model']}, {reward_title(row['reward'])}, {row['rewriting']}: {answer} ({interval(gap)})."


def _table(rows: Rows) -> Table:
    return Table(
        name="persona_prompts",
        title="New prompts and new responses",
        note="Accuracy after the last epoch, mean over seeds ± their standard deviation, 95 % intervals over prompts and seeds. "
        "The last column is new prompts with the same responses minus new responses on the same prompts.",
        columns=f"model reward rewriting seeds {' '.join(CELLS)} {CONTRAST}",
        titles={**CELLS, CONTRAST: "difference"},
        rows=titled(rows),
        forms={CONTRAST: "+.3f"},
    )


EXPERIMENT = analyses_of(Study(name="persona_prompts", version=3, find=find, sweep="persona"))
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
