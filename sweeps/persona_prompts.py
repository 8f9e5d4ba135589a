"""Is it the prompts or the responses that an IM-RM does not generalise to? Two by two, from the scores of sweeps/persona.py.

                    original responses            paraphrased responses
training prompts    what was trained on           the same prompts, new responses
test prompts        new prompts, same responses   both new

The original responses are few and stand in training with other prompts, so the row below changes prompts alone. Nothing is
trained: accuracies of the last epoch, resampled over prompts and seeds; a prompt's pairs count as one.

python sweeps/persona_prompts.py                       of the sweep persona in this storage
python sweeps/persona_prompts.py --sweep NAME
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from orchestrator.cli.analyses import main
from orchestrator.cli.session import Session
from orchestrator.report.scored import (
    ScoredOptions,
    declare_scored,
    rests_on,
    results_of,
    write_analysis,
    write_figure,
)
from orchestrator.spec.analyses import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt, Store
from sweeps.persona import ON_TRAINING_PROMPTS
from trainers.errors import DataError

# Raise when the analysis computes something else from the same scores.
VERSION = 2
CELLS = ("seen", "new_prompts", "new_responses", "both_new")
CONTRAST = "prompts_over_responses"


@dataclass(frozen=True, kw_only=True)
class PersonaPromptsOptions(ScoredOptions):
    """New prompts against new responses."""

    sweep: Annotated[str, tyro.conf.arg(metavar="NAME")] = "persona"
    """The sweep in the same storage whose scores are read."""


def declare(options: PersonaPromptsOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis of the sweep."""
    return declare_scored(options, session, analysis="persona_prompts", version=VERSION)


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """A two by two table for every model, reward type and rewriting."""
    results = [item for item in results_of(stage.parameters, inputs.store) if item.learned]
    rows = [
        _row(trials, rewritten, inputs.store)
        for trials in _groups(results)
        for rewritten in _rewritings(trials[0])
    ]
    if not rows:
        raise DataError(
            "no trial of this sweep has learned and was evaluated on training and test prompts with original and "
            "rewritten responses; run sweeps/persona.py."
        )
    table = _table(rows)
    write_analysis(
        attempt.directory,
        "persona_prompts",
        [rests_on(stage.parameters, inputs.store), *_said(rows)],
        (table,),
    )
    plain = [{**row, **{name: asdict(row[name]) for name in (*CELLS, CONTRAST)}} for row in rows]
    (attempt.directory / "results.json").write_text(
        json.dumps({"cells": plain}, indent=1, ensure_ascii=False)
    )
    write_figure(attempt.directory, "persona_prompts", lambda: _draw(rows))
    attempt.info.update(results={"cells": plain})


def _groups(results: Sequence[Any]) -> list[list[Any]]:
    """The seeds of each training set, model and reward type."""
    found: dict[tuple[str, str, str], list[Any]] = {}
    for item in results:
        record = item.record
        found.setdefault((record.train_set, record.model, record.reward), []).append(item)
    return list(found.values())


def _rewritings(trial: Any) -> list[str]:
    """The rewritings that are evaluated on test and training prompts, as the training set itself is."""
    known = {item.dataset: item.category for item in trial.final}
    own = trial.record.train_set
    if own not in known or f"{own}{ON_TRAINING_PROMPTS}" not in known:
        return []
    return [
        name
        for name, category in known.items()
        if category == "token-level shift" and f"{name}{ON_TRAINING_PROMPTS}" in known
    ]


def _row(trials: Sequence[Any], rewritten: str, store: Store) -> dict[str, Any]:
    """Accuracies of one model and reward type, and what new prompts leave of it over what new responses leave."""
    import numpy as np

    from orchestrator.report.controls import gap_estimate
    from orchestrator.report.statistics import accuracy_estimate, generator, seed_weights

    record = trials[0].record
    sets = {
        "seen": f"{record.train_set}{ON_TRAINING_PROMPTS}",
        "new_prompts": record.train_set,
        "new_responses": f"{rewritten}{ON_TRAINING_PROMPTS}",
        "both_new": rewritten,
    }
    weights_BS = seed_weights(len(trials), _draws(), generator("seeds", record.train_set, record.model))
    values, draws, prompts = {}, {}, {}
    for name, dataset in sets.items():
        # The same prompts are drawn for original and rewritten responses.
        side = "test" if name in ("new_prompts", "both_new") else "training"
        by_seed = [_by_prompt(trial, dataset, store) for trial in trials]
        values[name] = [float(found_Q.mean()) for found_Q in by_seed]
        prompts[name] = len(by_seed[0])
        counts_BQ = _prompt_counts(prompts[name], side) / prompts[name]
        drawn_BS = np.stack([counts_BQ @ found_Q for found_Q in by_seed], axis=1)
        draws[name] = (weights_BS * drawn_BS).sum(axis=1)
    cells = {
        name: accuracy_estimate(float(np.mean(values[name])), draws[name], prompts[name], values[name])
        for name in CELLS
    }
    gaps = np.subtract(values["new_prompts"], values["new_responses"])
    fewest = min(prompts["new_prompts"], prompts["new_responses"])
    contrast = gap_estimate(
        float(gaps.mean()), draws["new_prompts"] - draws["new_responses"], fewest, gaps.tolist()
    )
    labels = {"train_set": record.train_set, "model": record.model, "reward": record.reward}
    return {**labels, "rewriting": rewritten, "seeds": len(trials), **cells, CONTRAST: contrast}


def _draws() -> int:
    from orchestrator.report.statistics import DRAWS

    return DRAWS


def _prompt_counts(prompts: int, side: str) -> Any:
    from orchestrator.report.statistics import generator, pair_counts

    return pair_counts(prompts, _draws(), generator("prompts", side))


def _by_prompt(trial: Any, dataset: str, store: Store) -> Any:
    """The accuracy on each prompt's pairs, in the order in which prompts first stand in the set."""
    import numpy as np

    from orchestrator.report.statistics import right
    from orchestrator.spec.datasets import pairs_of

    (result,) = [item for item in trial.final if item.dataset == dataset]
    (record,) = [
        item
        for item in trial.record.evaluations
        if (item.dataset, item.epoch) == (dataset, trial.last_epoch or item.epoch)
    ]
    pairs, scores = pairs_of(store, record.dataset_digest), result.scores
    # Without the rows every pair is taken for a prompt of its own.
    asked = [pairs[row].prompt if pairs else row for row in scores.index]
    numbers: dict[Any, int] = {}
    prompt_P = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in asked])
    return np.bincount(prompt_P, right(scores.chosen, scores.rejected)) / np.bincount(prompt_P)


def _said(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on each row."""
    from orchestrator.report.summary import reward_title

    found = []
    for row in rows:
        who = f"{row['model']}, {reward_title(row['reward'])}, {row['rewriting']}"
        gap, loss = row[CONTRAST], row["new_prompts"].value - row["seen"].value
        interval = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        if gap.low > 0:
            answer = "new responses cost more than new prompts"
        elif gap.high < 0:
            answer = "new prompts cost more than new responses"
        else:
            answer = "new prompts and new responses cost the same, as far as can be told"
        found.append(
            f"{who}: {answer} ({interval}); new prompts alone change its accuracy by {loss:+.3f}, "
            f"new responses alone by {row['new_responses'].value - row['seen'].value:+.3f}."
        )
    return found


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from orchestrator.report.summary import reward_title
    from orchestrator.report.tables import Table, columns

    return Table(
        name="persona_prompts",
        title="New prompts and new responses",
        note="Accuracy after the last epoch, mean over seeds ± their standard deviation, 95 % intervals over prompts and seeds. "
        "The last column is new prompts with the same responses minus new responses on the same prompts.",
        columns=columns(
            ("model", "model"),
            ("reward", "reward"),
            ("rewriting", "rewriting"),
            ("seeds", "seeds"),
            ("seen", "training prompts, original responses"),
            ("new_prompts", "test prompts, original responses"),
            ("new_responses", "training prompts, new responses"),
            ("both_new", "test prompts, new responses"),
            (CONTRAST, "difference", "+.3f"),
        ),
        rows=tuple(
            (
                row["model"],
                reward_title(row["reward"]),
                row["rewriting"],
                row["seeds"],
                *(row[name] for name in (*CELLS, CONTRAST)),
            )
            for row in rows
        ),
    )


def _draw(rows: Sequence[dict[str, Any]]) -> Any:
    """A panel per model and rewriting: original responses left, new ones right, test prompts hollow."""
    from orchestrator.report.house_style import look, panels
    from orchestrator.report.summary import reward_title

    where = list(dict.fromkeys((row["model"], row["rewriting"]) for row in rows))
    kinds = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = panels(1, len(where), 3.6, 2.8)
    for axis, place in zip(axes, where, strict=True):
        for number, row in enumerate(row for row in rows if (row["model"], row["rewriting"]) == place):
            drawn = look(row["reward"], kinds)
            for cells, full, shift in (
                (("seen", "new_responses"), drawn.colour, 0),
                (("new_prompts", "both_new"), "white", 0.1),
            ):
                at = [left + shift + 0.2 * number for left in (0, 1)]
                values = [row[name] for name in cells]
                axis.vlines(at, [v.low for v in values], [v.high for v in values], color=drawn.colour)
                prompts = "test prompts" if shift else "training prompts"
                axis.plot(
                    at,
                    [value.value for value in values],
                    drawn.line,
                    marker=drawn.marker,
                    color=drawn.colour,
                    markerfacecolor=full,
                    label=f"{reward_title(row['reward'])}, {prompts}",
                )
        axis.set_xticks([0.15, 1.15], ["original responses", "new responses"])
        axis.set_ylim(-0.05, 1.05)
        axis.set_title(" · ".join(place))
    axes[0].set_ylabel("accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    main(PersonaPromptsOptions, "persona_prompts", declare, compute, Path(__file__).parent)
