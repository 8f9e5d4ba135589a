"""Is being in-distribution a matter of tokens? Accuracy by tenths of overlap with the nearest training pair; nothing is trained.

Overlap is Dice's coefficient of the distinct tokens of both responses, each on its side. Beside it stands the largest cosine of
D = h⁺ − h⁻ with that of a training pair, in the untrained model's hidden states (paper §5). What follows tokens falls with
the first, what follows meaning with the second.

python sweeps/token_overlap.py                                             full_grid's llama-64 on the tiny world
python sweeps/token_overlap.py --sweep NAME --models NAME=PATH --train-set NAME --eval-sets NAME
"""

from collections.abc import Sequence

from orchestrator.cli.analyses import SEEN, analyses_of_models, load_untrained
from orchestrator.cli.main import main
from orchestrator.report.comparison import Analysis, set_outcomes
from orchestrator.report.results import TrialResult
from orchestrator.report.studies import Findings, Rows, Study, by_nearness, titled
from orchestrator.report.tables import Table
from orchestrator.spec.stages import AnalysisInputs
from trainers.errors import DataError

MEASURES = {"overlap": "token overlap", "cosine": "cosine of hidden states"}
CAUTION = (
    "Overlap within one set varies with everything else that makes a pair hard: a correlation is no cause."
)


def find(results: Sequence[TrialResult], inputs: AnalysisInputs) -> Findings:
    """Return accuracy by tenths of both measures, for each set and for all sets together."""
    from trainers.theory.representations import nearness

    kinds = list(dict.fromkeys(item.record.reward for item in results if item.learned))
    outcomes = [item for item in set_outcomes(Analysis(results), kinds) if item.dataset in inputs.pairs]
    if not outcomes:
        raise DataError(
            f"the sweep has scored none of {', '.join(name for name in inputs.pairs if name != SEEN)} with every reward type that "
            "has learned; give others as --eval-sets."
        )
    model = load_untrained(inputs, "unembedding")
    near = nearness(
        model, inputs.pairs[SEEN], {item.dataset: inputs.pairs[item.dataset] for item in outcomes}
    )
    pairs, deciles, relations = by_nearness(outcomes, near, list(MEASURES))
    return Findings(
        said=[CAUTION],
        tables=_tables(relations, deciles),
        results={"deciles": deciles, "correlations": relations},
        rows={"pairs": pairs},
    )


def _tables(relations: Rows, deciles: Rows) -> tuple[Table, Table]:
    relations, deciles = (
        [{**row, "measure": MEASURES[row["measure"]]} for row in titled(rows)]
        for rows in (relations, deciles)
    )
    correlations = Table(
        name="correlations",
        title="Being right by nearness to training",
        note="Spearman's rank correlation over pairs, – where one side does not vary. A pair's accuracy is its mean over seeds.",
        columns="set measure reward pairs correlation",
        titles={"measure": "by"},
        rows=relations,
        forms={"correlation": "+.3f"},
    )
    tenths = Table(
        name="deciles",
        title="Accuracy by tenths of nearness to training",
        note="Pairs of equal nearness stay together, so there may be fewer than ten; 95 % intervals over a tenth's pairs.",
        columns="set measure reward decile from to pairs accuracy",
        titles={"measure": "by", "decile": "tenth"},
        rows=deciles,
        forms={"from": ".5f", "to": ".5f"},
    )
    return correlations, tenths


EXPERIMENT = analyses_of_models(Study(name="token_overlap", version=4, find=find))
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
