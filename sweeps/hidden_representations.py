"""Untrained hidden states of pairs and their paraphrases (paper §5, the footnote): D = h⁺ − h⁻ at a response's last token.

With w the max-margin separator of the training pairs' D: the statistics of ⟨D_seen, D_unseen⟩ and of cos(w, D_unseen).
Where both are above zero, an EX-RM's head learns of a pair what holds of its paraphrase.

python sweeps/hidden_representations.py                                           built-in tiny models in the tiny world
python sweeps/hidden_representations.py --models PATH --train-set persona=FILE.jsonl
"""

from dataclasses import dataclass
from typing import Any

from orchestrator.cli.analyses import SEEN, analyses_of_untrained, load_untrained
from orchestrator.cli.main import main
from orchestrator.report.studies import write_analysis
from orchestrator.report.tables import Table
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt

MEASURES = {"inner_product": "⟨D_seen, D_unseen⟩", "cosine": "cos(w, D_unseen)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """No parameter but the model and the pairs."""


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write the statistics of every set."""
    from trainers.theory import representations as of

    model = load_untrained(inputs, "unembedding")
    found = {name: of.differences(of.pair_states(model, pairs)) for name, pairs in inputs.pairs.items()}
    seen = found.pop(SEEN)
    direction = of.separator(seen)
    results = {
        name: {
            "inner_product": of.statistics(of.inner_products(seen, unseen)),
            "cosine": of.statistics(of.cosines(direction, unseen)),
        }
        for name, unseen in found.items()
    }
    rows: list[dict[str, Any]] = [
        {"set": name, "measure": measure, **numbers}
        for name, measures in results.items()
        for measure, numbers in measures.items()
    ]
    table = Table(
        name="statistics",
        title="",
        columns="set measure mean min first_quartile median third_quartile max share_positive",
        titles={"set": "unseen set", "measure": "of"},
        rows=[{**row, "measure": MEASURES[str(row["measure"])]} for row in rows],
    )
    write_analysis(
        attempt,
        inputs.name,
        [f"Untrained, {len(inputs.pairs[SEEN])} training pairs.", table.markdown()],
        results=results,
        rows={"statistics": rows},
    )


# Raise the version when the analysis computes something else. 2: a pair of one response twice has a cosine.
EXPERIMENT = analyses_of_untrained("hidden_representations", 2, compute, Parameters())
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
