"""Is being in-distribution a matter of tokens? Accuracy by tenths of overlap with the nearest training pair; nothing is trained.

Overlap is Dice's coefficient of the distinct tokens of both responses, each on its side. Beside it stands the largest cosine of
D = h⁺ − h⁻ with that of a training pair, in the untrained model's hidden states (paper §5). What follows tokens falls with
the first, what follows meaning with the second.

python sweeps/token_overlap.py                                             full_grid's llama-64 on the tiny world
python sweeps/token_overlap.py --sweep NAME --models NAME=PATH --train-set NAME --eval-sets NAME
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import tyro

from orchestrator.cli.analyses import SEEN, Analyses, ModelOptions, declare_models, load_untrained
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.analysis_files import Rows, draw_lines, write_analysis
from orchestrator.report.comparison import SetOutcomes, set_outcomes
from orchestrator.report.house_style import legend
from orchestrator.report.published import COMPARED
from orchestrator.report.results import Scored, results_of, scored
from orchestrator.report.statistics import Floats, by_decile, rank_correlation
from orchestrator.report.tables import Table, reward_title
from orchestrator.spec import selection
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from orchestrator.store.records import read_declaration
from trainers.data.texts import bag, nearest_overlap
from trainers.errors import DataError, SpecError
from trainers.specs import given_name

# Raise when the analysis computes something else from the same scores, model and pairs.
VERSION = 2
MEASURES = {"overlap": "token overlap", "cosine": "cosine of hidden states"}
TOGETHER = "together"


@dataclass(frozen=True, kw_only=True)
class TokenOverlapOptions(ModelOptions):
    """Accuracy by tenths of token overlap with training."""

    sweep: Annotated[str, tyro.conf.arg(metavar="NAME")] = "full_grid"
    """The sweep in the same storage whose scores are read; its numbers of pairs are taken where none are given."""


def declare(options: TokenOverlapOptions, session: Session) -> Sequence[AnalyseStage]:
    """One analysis per model."""
    complete = scored(session.store, options.sweep)
    trained = selection.parse_dataset(options.train_set, "--train-set").name
    drawn = {
        (trial.model, trial.train_set): trial.parameters
        for trial in read_declaration(given_name("--sweep", options.sweep), session.store).trials
    }
    stages: list[AnalyseStage] = []
    for text in options.models:
        name = selection.parse_model(text).name
        trials = tuple(item for item in complete.trials if (item.model, item.train_set) == (name, trained))
        if not trials:
            raise SpecError(
                f"--sweep {options.sweep} has no complete trial of {name} on {trained}; give its --models and --train-set."
            )
        parameters = drawn[name, trained]
        own = replace(
            options,
            models=(text,),
            max_train_pairs=options.max_train_pairs or parameters.get("max_train_pairs"),
            max_eval_pairs=options.max_eval_pairs or parameters.get("max_eval_pairs"),
        )
        stages += declare_models(
            own,
            session,
            analysis="token_overlap",
            version=VERSION,
            compute=compute,
            parameters=Scored(trials=trials, missing=complete.missing),
        )
    return stages


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Accuracy by tenths of both measures, each set's and all sets' together."""
    results, basis = results_of(stage.parameters, inputs.store)
    outcomes = {item.dataset: item for item in set_outcomes(results) if item.dataset in inputs.pairs}
    if not outcomes:
        raise DataError(
            f"the sweep has scored none of {', '.join(name for name in inputs.pairs if name != SEEN)} with both EX-RM and "
            "IM-RM; give others as --eval-sets."
        )
    pairs = _measured(inputs, outcomes)
    if not pairs:
        raise DataError(
            "no pair that was scored is among those drawn here; give the sweep's --max-eval-pairs."
        )
    deciles, relations = [], []
    for name in [*outcomes, *([TOGETHER] if len(outcomes) > 1 else [])]:
        here = [row for row in pairs if name in (TOGETHER, row["set"])]
        for measure, kind in itertools.product(MEASURES, COMPARED):
            labels = {"set": name, "measure": measure, "reward": kind}
            nearness_P, right_P = _column(here, measure), _column(here, kind)
            deciles += [{**labels, **row} for row in by_decile(nearness_P, right_P)]
            correlation = rank_correlation(nearness_P, right_P)
            relations.append({**labels, "pairs": len(here), "correlation": correlation})
    write_analysis(
        attempt,
        inputs.name,
        [basis, *_said(relations, pairs)],
        (_relation_table(relations), _decile_table(deciles)),
        results={"deciles": deciles, "correlations": relations},
        rows={"pairs": pairs},
        figures={"token_overlap": lambda: _draw(deciles)},
    )


def _measured(inputs: AnalysisInputs, outcomes: dict[str, SetOutcomes]) -> Rows:
    """Every pair that was scored, with its overlap with the nearest training pair and the largest cosine with one."""
    from trainers.theory.representations import nearest_cosines
    from trainers.theory.states import differences, pair_states

    model = load_untrained(inputs, "unembedding")
    sets = {name: inputs.pairs[name] for name in (SEEN, *outcomes)}
    found = {name: differences(pair_states(model, pairs)) for name, pairs in sets.items()}
    bags = {name: [bag(pair.chosen, pair.rejected) for pair in pairs] for name, pairs in sets.items()}
    rows = []
    for name, item in outcomes.items():
        overlaps = nearest_overlap(bags[name], bags[SEEN])
        cosines = nearest_cosines(found[SEEN], found[name])
        of_row = {pair.index: place for place, pair in enumerate(sets[name])}
        rows += [
            {
                "set": name,
                "index": index,
                "overlap": float(overlaps[of_row[index]]),
                "cosine": float(cosines[of_row[index]]),
                **{kind: float(item.right[kind][place]) for kind in COMPARED},
            }
            for place, index in enumerate(item.index.tolist())
            if index in of_row
        ]
    return rows


def _column(rows: Rows, name: str) -> Floats:
    # Cosines of equal states differ in their last bits.
    return np.round(np.array([row[name] for row in rows]), 9)


def _said(relations: Rows, pairs: Rows) -> list[str]:
    """Say what cannot be told for want of variation."""
    flat = [
        f"{name}: {title}"
        for name in dict.fromkeys(row["set"] for row in pairs)
        for measure, title in MEASURES.items()
        if np.ptp(_column([row for row in pairs if row["set"] == name], measure)) == 0
    ]
    said = [
        "Overlap within one set varies with everything else that makes a pair hard: a correlation is no cause."
    ]
    if flat:
        said.append(f"The same for every pair, so that nothing can be told by it: {'; '.join(flat)}.")
    if all(row["correlation"] is None for row in relations):
        said.append("No correlation can be computed.")
    return said


def _shown(rows: Rows) -> Rows:
    return [
        {**row, "measure": MEASURES[row["measure"]], "reward": reward_title(row["reward"])} for row in rows
    ]


def _relation_table(rows: Rows) -> Table:
    return Table(
        name="correlations",
        title="Being right by nearness to training",
        note="Spearman's rank correlation over pairs, – where one side does not vary. A pair's accuracy is its mean over seeds.",
        columns="set measure reward pairs correlation",
        titles={"measure": "by"},
        rows=_shown(rows),
        forms={"correlation": "+.3f"},
    )


def _decile_table(rows: Rows) -> Table:
    return Table(
        name="deciles",
        title="Accuracy by tenths of nearness to training",
        note="Pairs of equal nearness stay together, so there may be fewer than ten; 95 % intervals over a tenth's pairs.",
        columns="set measure reward decile from to pairs accuracy",
        titles={"measure": "by", "decile": "tenth"},
        rows=_shown(rows),
        forms={"from": ".5f", "to": ".5f"},
    )


def _draw(rows: Rows) -> Any:
    """A row per set and a column per measure; points at the middle of each tenth's values."""
    shown = [{**row, "middle": (row["from"] + row["to"]) / 2} for row in rows]
    where, columns = ("set", "measure"), len(MEASURES)
    figure, axes = draw_lines(shown, where, "middle", "accuracy", columns=columns, width=3.6, height=2.3)
    for (name, measure), axis in axes.items():
        axis.set(title=name, xlabel=MEASURES[measure])
    legend(figure, axes.values())
    return figure


if __name__ == "__main__":
    main(Analyses(options=TokenOverlapOptions, declare=declare), __file__, __doc__)
