"""The paper's Persona experiment (paper §2): one controlled token-level shift, watched epoch by epoch.

Trained on agreeable answers in a few words, evaluated on training and test prompts with the original responses and
with paraphrases that share no word with them.

python sweeps/persona.py --profile laptop                    the same in miniature: built-in models in the tiny world
python sweeps/persona.py --train-sets persona=FILE.jsonl     Persona's statements from a file, not from the hub
python sweeps/persona.py --keep-epochs 1 5 10 25             weights and evaluations after these epochs and the last only
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from orchestrator.cli.main import main
from orchestrator.spec import catalog
from orchestrator.spec.catalog import Profile
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, grid, only
from orchestrator.store.records import Category
from trainers.data.known import PERSONA
from trainers.specs import BUILTIN, DatasetSpec, ModelSpec, OptimSpec

ON_TRAINING_PROMPTS = "_train"


def _recipe(model: ModelSpec, train_set: DatasetSpec) -> OptimSpec:
    """The paper's (paper §1): 50 epochs of 80 pairs."""
    if model.source.startswith(BUILTIN):
        return catalog.recipe(model, train_set)
    return OptimSpec(epochs=50)


PAPER = Profile(
    name="paper",
    models=(
        ModelSpec(name="pythia-1b", source="EleutherAI/pythia-1b", parameters=1_011_781_632),
        ModelSpec(name="llama-3.2-1b-base", source="meta-llama/Llama-3.2-1B", parameters=1_235_814_400),
        catalog.MODELS["llama-3.2-1b"],
        catalog.MODELS["qwen2.5-1.5b"],
    ),
    train_sets=(catalog.dataset("persona"),),
    eval_sets=(catalog.dataset("persona"), catalog.dataset("persona_paraphrase")),
    seeds=(0, 1, 2),
    max_train_pairs=None,
    max_eval_pairs=None,
    recipe=_recipe,
    keep_epochs="every",
)
LAPTOP = replace(
    PAPER,
    name="laptop",
    models=(catalog.MODELS["llama-64"],),
    train_sets=(catalog.dataset("tiny_world"),),
    eval_sets=(catalog.dataset("tiny_world"), catalog.dataset("tiny_world_paraphrase")),
    seeds=(0,),
)
PROFILES = {"paper": PAPER, "laptop": LAPTOP}


def persona(chosen: Selection) -> Sweep:
    """Every model with every reward type, evaluated on the test and the training prompts of every evaluation set."""
    trials = tuple(
        trial
        for train_set in chosen.train_sets
        for trial in grid(
            models=chosen.models,
            rewards=chosen.rewards,
            train_sets=[train_set],
            eval_sets=_eval_sets(train_set, chosen.eval_sets),
            seeds=chosen.seeds,
            recipe=chosen.recipe,
            train_draw=chosen.train_draw,
            eval_draw=chosen.eval_draw,
            keep_epochs=chosen.keep_epochs,
        )
    )
    seen: list[tuple[str, str, Category]] = [
        (train_set.name, f"{train_set.name}{ON_TRAINING_PROMPTS}", "training pairs")
        for train_set in chosen.train_sets
    ]
    return Sweep(
        name=chosen.name,
        trials=only(trials, chosen.only)[: chosen.max_trials],
        categories=(*seen, *chosen.categories),
        placements=chosen.placements,
    )


def _eval_sets(train_set: DatasetSpec, eval_sets: Iterable[DatasetSpec]) -> list[DatasetSpec]:
    """Each set's test split, and its training split under a name of its own; Persona's from where its pairs are."""
    placed = [
        replace(item, source=train_set.source) if item.selection == PERSONA else item for item in eval_sets
    ]
    return [
        *placed,
        *(
            replace(item, name=f"{item.name}{ON_TRAINING_PROMPTS}", test_split=item.train_split)
            for item in placed
        ),
    ]


if __name__ == "__main__":
    main("persona", persona, Path(__file__).parent, profiles=PROFILES)
