"""Is being in-distribution a matter of tokens? Accuracy by tenths of overlap with the nearest training pair; nothing is trained.

Overlap is Dice's coefficient of the distinct tokens of both responses, each on its side. Beside it stands the largest cosine of
D = h⁺ − h⁻ with that of a training pair, in the untrained model's hidden states (paper §5). What follows tokens falls with
the first, what follows meaning with the second.

python sweeps/token_overlap.py                                             full_grid's llama-64 on the tiny world
python sweeps/token_overlap.py --sweep NAME --models NAME=PATH --train-set NAME --eval-sets NAME
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import tyro

from orchestrator.cli.analyses import SEEN, Analyses, ModelOptions, declare_models, load_untrained
from orchestrator.cli.main import main
from orchestrator.cli.session import Session
from orchestrator.report.house_style import write_figure
from orchestrator.report.results import Scored, results_of, scored
from orchestrator.report.tables import COMPARED, Table, reward_title, write_summary
from orchestrator.spec import selection
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from orchestrator.store.records import read_declaration
from trainers.errors import DataError, SpecError
from trainers.specs import given_name

# Raise when the analysis computes something else from the same scores, model and pairs.
VERSION = 2
MEASURES = (("overlap", "token overlap"), ("cosine", "cosine of hidden states"))
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
    import pyarrow as pa
    from pyarrow import parquet

    from orchestrator.report.comparison import set_outcomes

    results, basis = results_of(stage.parameters, inputs.store)
    outcomes = {item.dataset: item for item in set_outcomes(results) if item.dataset in inputs.pairs}
    if not outcomes:
        raise DataError(
            f"the sweep has scored none of {', '.join(name for name in inputs.pairs if name != SEEN)} with both EX-RM and "
            "IM-RM; give others as --eval-sets."
        )
    measured = _measured(inputs, list(outcomes))
    pairs = [row for name in outcomes for row in _pairs(outcomes[name], measured[name])]
    if not pairs:
        raise DataError(
            "no pair that was scored is among those drawn here; give the sweep's --max-eval-pairs."
        )
    parquet.write_table(pa.Table.from_pylist(pairs), attempt.directory / "pairs.parquet")
    deciles, relations = [], []
    for name in [*outcomes, *([TOGETHER] if len(outcomes) > 1 else [])]:
        here = [row for row in pairs if name in (TOGETHER, row["set"])]
        for measure, _ in MEASURES:
            for kind in COMPARED:
                labels = {"set": name, "measure": measure, "reward": kind}
                deciles += [{**labels, **row} for row in _deciles(here, measure, kind)]
                relations.append(
                    {**labels, "pairs": len(here), "correlation": _correlation(here, measure, kind)}
                )
    tables = (_relation_table(relations), _decile_table(deciles))
    paragraphs = [basis, *_said(relations, pairs)]
    write_summary(attempt.directory, inputs.name, paragraphs, tables)
    found = {
        "deciles": [{**row, "accuracy": asdict(row["accuracy"])} for row in deciles],
        "correlations": relations,
    }
    (attempt.directory / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
    write_figure(attempt.directory, "token_overlap", lambda: _draw(deciles))
    attempt.info.update(results=found)


def _measured(inputs: AnalysisInputs, names: Sequence[str]) -> dict[str, dict[int, tuple[float, float]]]:
    """Return by set and row the overlap with the nearest training pair and the largest cosine with one."""
    from trainers.data.texts import bag, nearest_overlap
    from trainers.theory.states import differences, pair_states

    model = load_untrained(inputs, "unembedding")
    directions = {name: differences(pair_states(model, inputs.pairs[name])) for name in (SEEN, *names)}
    unit = {
        name: found / found.norm(dim=1, keepdim=True).clamp_min(1e-300) for name, found in directions.items()
    }
    bags = {name: [bag(pair.chosen, pair.rejected) for pair in inputs.pairs[name]] for name in (SEEN, *names)}
    return {
        name: {
            pair.index: (float(overlap), float(cosine))
            for pair, overlap, cosine in zip(
                inputs.pairs[name],
                nearest_overlap(bags[name], bags[SEEN]),
                (unit[name] @ unit[SEEN].T).amax(dim=1),
                strict=True,
            )
        }
        for name in names
    }


def _pairs(item: Any, measured: dict[int, tuple[float, float]]) -> list[dict[str, Any]]:
    """The pairs that were scored and measured."""
    return [
        {
            "set": item.dataset,
            "index": int(index),
            "overlap": measured[int(index)][0],
            "cosine": measured[int(index)][1],
            "ex_rm": float(item.right["ex_rm"][place]),
            "im_rm": float(item.right["im_rm"][place]),
        }
        for place, index in enumerate(item.index)
        if int(index) in measured
    ]


def _columns(rows: Sequence[dict[str, Any]], *names: str) -> list[Any]:
    import numpy as np

    # Cosines of equal states differ in their last bits.
    return [np.round(np.array([row[name] for row in rows]), 9) for name in names]


def _deciles(rows: Sequence[dict[str, Any]], measure: str, kind: str) -> list[dict[str, Any]]:
    from orchestrator.report.statistics import by_decile

    return by_decile(*_columns(rows, measure, kind))


def _correlation(rows: Sequence[dict[str, Any]], measure: str, kind: str) -> float | None:
    """Spearman's, of the measure with being right; None where one of them does not vary."""
    from orchestrator.report.statistics import rank_correlation

    return rank_correlation(*_columns(rows, measure, kind))


def _said(relations: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Say what cannot be told for want of variation."""
    flat = [
        f"{name}: {title}"
        for name in dict.fromkeys(row["set"] for row in pairs)
        for measure, title in MEASURES
        if len({round(row[measure], 9) for row in pairs if row["set"] == name}) == 1
    ]
    said = [
        "Overlap within one set varies with everything else that makes a pair hard: a correlation is no cause."
    ]
    if flat:
        said.append(f"The same for every pair, so that nothing can be told by it: {'; '.join(flat)}.")
    if all(row["correlation"] is None for row in relations):
        said.append("No correlation can be computed.")
    return said


def _shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    titles = dict(MEASURES)
    return [{**row, "measure": titles[row["measure"]], "reward": reward_title(row["reward"])} for row in rows]


def _relation_table(rows: Sequence[dict[str, Any]]) -> Table:
    return Table(
        name="correlations",
        title="Being right by nearness to training",
        note="Spearman's rank correlation over pairs, – where one side does not vary. A pair's accuracy is its mean over seeds.",
        columns="set measure reward pairs correlation",
        titles={"measure": "by"},
        rows=_shown(rows),
        forms={"correlation": "+.3f"},
    )


def _decile_table(rows: Sequence[dict[str, Any]]) -> Table:
    return Table(
        name="deciles",
        title="Accuracy by tenths of nearness to training",
        note="Pairs of equal nearness stay together, so there may be fewer than ten; 95 % intervals over a tenth's pairs.",
        columns="set measure reward decile from to pairs accuracy",
        titles={"measure": "by", "decile": "tenth"},
        rows=_shown(rows),
        forms={"from": ".5f", "to": ".5f"},
    )


def _draw(rows: Sequence[dict[str, Any]]) -> Any:
    """A row per set and a column per measure; points at the middle of each tenth's values."""
    from orchestrator.report.house_style import legend, panels, points

    names = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = panels(len(names), len(MEASURES), 3.6, 2.3)
    places = [(name, *measure) for name in names for measure in MEASURES]
    for axis, (name, measure, title) in zip(axes, places, strict=True):
        for kind in COMPARED:
            here = [
                row for row in rows if (row["set"], row["measure"], row["reward"]) == (name, measure, kind)
            ]
            at = [(row["from"] + row["to"]) / 2 for row in here]
            points(axis, at, [row["accuracy"] for row in here], kind, COMPARED)
        axis.set_ylim(-0.05, 1.05)
        axis.set_title(name)
        axis.set_xlabel(title)
    axes[0].set_ylabel("accuracy")
    legend(figure, axes)
    return figure


if __name__ == "__main__":
    main(Analyses(options=TokenOverlapOptions, declare=declare), __file__, __doc__)
