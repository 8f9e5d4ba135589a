"""The paper's verification against generation (paper §2, §4): who can tell a Hamiltonian cycle can yet write none.

Reward models are trained to tell a graph's cycle from another order of its vertices. An IM-RM is a language model, so
it is asked for a cycle as well: one answer a prompt at temperature 1 as in the paper, the likeliest answer, and the best
of k by its own reward.

python sweeps/hamiltonian.py --profile laptop                  5 vertices, a built-in model
python sweeps/hamiltonian.py --profile paper                   10 vertices, Pythia 1B; its separators are no tokens of their own
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cli.main import Grid, main
from orchestrator.report.studies import write_analysis
from orchestrator.report.tables import Table
from orchestrator.spec import catalog
from orchestrator.spec.catalog import Profile
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, TrainStage, TrialPlan
from orchestrator.store.artifacts import Attempt
from sweeps.full_grid import full_grid
from trainers.specs import BUILTIN, ModelSpec, OptimSpec

# Raise when the generation check computes something else from the same weights. 3: a folder's own settings of generation do not count.
VERSION = 3
# The paper's 15 epochs (paper §1); a tiny model takes more, at a rate of its own.
RECIPE = catalog.recipe_of(OptimSpec(epochs=15), OptimSpec(lr=1e-3, epochs=40, effective_batch=32))


def _profile(name: str, model: ModelSpec, graphs: str, seeds: tuple[int, ...]) -> Profile:
    one, sets = replace(catalog.ONE_MODEL, name=name, models=(model,)), (catalog.dataset(graphs),)
    return replace(one, train_sets=sets, eval_sets=sets, seeds=seeds, recipe=RECIPE)


PROFILES = {
    "paper": _profile("paper", catalog.PYTHIA_1B, "hamiltonian_paper", (0, 1, 2)),
    "laptop": _profile("laptop", catalog.MODELS["llama-64"], "hamiltonian_verification", (0,)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How many answers are drawn of each prompt, and by which seed. The first one is the paper's one."""

    samples: int = 8
    seed: int = 0


def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """Declare a generation check of each trained IM-RM on each set of graphs that it is evaluated on."""
    stages = []
    for plan in plans:
        sets = plan.spec.eval_sets
        for graphs, evaluation in zip(sets, plan.evaluations[-len(sets) :], strict=True):
            if plan.spec.reward.kind == "im_rm" and graphs.source.startswith(f"{BUILTIN}hamiltonian"):
                stage = AnalyseStage(
                    analysis=f"generation · {plan.spec.name} · {evaluation.prepared.split.name}",
                    version=VERSION,
                    compute=compute,
                    parameters=Parameters(),
                    base=plan.train.base,
                    prepared=(("prompts", evaluation.prepared),),
                    reads=(plan.train,),
                    loads_weights=True,
                )
                stages.append(stage)
    return stages


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Judge answers of the trained model by the exact parser."""
    from trainers.data.records import read_written_pairs
    from trainers.theory.answers import shares, verified

    (training,), pairs = stage.reads, inputs.pairs["prompts"]
    assert isinstance(training, TrainStage)
    base = training.base.weights(inputs.location)
    location = str(inputs.store.read("weights", training.key, "model") / "model")
    split = inputs.store.read("dataset", stage.prepared[0][1].split.digest)
    texts = read_written_pairs(split / "pairs.jsonl")
    prompts = [texts[pair.index].prompt[-1].content for pair in pairs]
    trained = replace(
        base, location=location, revision=None, template=None, base=(base.location, base.revision)
    )
    asked: Parameters = stage.parameters
    rows = verified(trained, base, pairs, prompts, training.reward, samples=asked.samples, seed=asked.seed)
    results: dict[str, Any] = {"name": stage.analysis, "prompts": len(prompts), **shares(rows)}
    table = Table(
        name="correct",
        title="",
        columns="sampled greedy best_of_k any_of_k",
        rows=[results],
        titles={
            "sampled": "one sample",
            "best_of_k": f"best of {asked.samples} by its reward",
            "any_of_k": f"any of {asked.samples}",
        },
    )
    shown = [f"Correct cycles written, share of {len(prompts)} prompts.", table.markdown()]
    write_analysis(attempt, stage.analysis, shown, results=results, rows={"answers": rows})


if __name__ == "__main__":
    main(Grid(build=full_grid, profiles=PROFILES, follow_up=declare), __file__, __doc__)
