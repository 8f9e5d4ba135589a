"""The paper's Persona experiment (paper §2): one controlled token-level shift, watched epoch by epoch.

Trained on agreeable answers in a few words, evaluated on training and test prompts with the original responses and
with paraphrases that share no word with them.

python sweeps/persona.py --profile laptop                    the same in miniature: built-in models in the tiny world
python sweeps/persona.py --train-sets persona=FILE.jsonl     Persona's statements from a file, not from the hub
python sweeps/persona.py --keep-epochs 1 5 10 25             weights and evaluations after these epochs and the last only
"""

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.cli.main import Grid, main
from orchestrator.spec import catalog
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, TrialSpec
from orchestrator.store.records import Category
from trainers.data.known import PERSONA
from trainers.evaluate.suites import SUITES
from trainers.specs import DatasetSpec, OptimSpec

ON_TRAINING_PROMPTS = "_train"


# The paper's 50 epochs of 80 pairs (paper §1).
RECIPE = catalog.recipe_of(OptimSpec(epochs=50))
PAPER = replace(
    catalog.PAPER,
    models=(
        catalog.PYTHIA_1B,
        catalog.LLAMA_1B_BASE,
        catalog.MODELS["llama-3.2-1b"],
        catalog.MODELS["qwen2.5-1.5b"],
    ),
    train_sets=(catalog.dataset("persona"),),
    eval_sets=(catalog.dataset("persona"), catalog.dataset("persona_paraphrase")),
    max_train_pairs=None,
    max_eval_pairs=None,
    recipe=RECIPE,
    keep_epochs="every",
)
LAPTOP = replace(catalog.ONE_MODEL, recipe=RECIPE, keep_epochs="every")
PROFILES = {"paper": PAPER, "laptop": LAPTOP}


def persona(chosen: Selection) -> Sweep:
    """Every model with every reward type, evaluated on the test and the training prompts of every evaluation set."""
    trials: list[TrialSpec] = []
    seen: list[tuple[str, str, Category]] = []
    for train_set in chosen.train_sets:
        eval_sets = _eval_sets(train_set, chosen.eval_sets)
        trials += chosen.trials(train_sets=(train_set,), eval_sets=eval_sets)
        seen.append((train_set.name, f"{train_set.name}{ON_TRAINING_PROMPTS}", "training pairs"))
    return chosen.sweep(trials, seen)


def _eval_sets(train_set: DatasetSpec, eval_sets: Iterable[DatasetSpec]) -> list[DatasetSpec]:
    """Return each set's test split, and its training split under another name; Persona's from its own file.

    A suite has no training split.
    """
    placed = [
        replace(item, source=train_set.source) if item.selection == PERSONA else item for item in eval_sets
    ]
    seen = [
        replace(item, name=f"{item.name}{ON_TRAINING_PROMPTS}", test_split=item.train_split)
        for item in placed
        if item.selection not in SUITES
    ]
    return [*placed, *seen]


if __name__ == "__main__":
    main(Grid(build=persona, profiles=PROFILES), __file__, __doc__)
