"""Can an IM-RM be made to ignore tokens? Training with rewritten copies, judged on another rewriting (paper §6.9).

A share of the training pairs gets a copy in other words: an axis of the sweep, `copies`. What counts is the accuracy on a
rewriting in yet other words (full size: French, for who trained with paraphrases), by share, for both reward types. Copies
are more pairs, so a larger share takes more steps as well.

python sweeps/mitigation.py --profile laptop
python sweeps/mitigation.py run --only copies=0.5
python sweeps/mitigation.py report --by copies
python sweeps/mitigation.py --train-sets ultrafeedback=DIR --eval-sets ultrafeedback=DIR \\
    ultrafeedback_paraphrase=DIR ultrafeedback_french=DIR

Of the evaluation sets, the first that rewrites the training set gives the copies, by its training split, and is not
evaluated on.
"""

from dataclasses import replace

from orchestrator.cli.main import Grid, main
from orchestrator.spec import catalog
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, TrialSpec
from trainers.errors import SpecError
from trainers.specs import BUILTIN, Augmentation, DatasetSpec

SHARES = (0.0, 0.25, 0.5, 1.0)
_SETS = ("ultrafeedback", "ultrafeedback_paraphrase", "ultrafeedback_french")

PROFILES = {
    "paper": replace(
        catalog.PAPER,
        train_sets=(catalog.dataset("ultrafeedback"),),
        eval_sets=tuple(map(catalog.dataset, _SETS)),
        # The copies must not be left out by a draw.
        max_train_pairs=None,
    ),
    "laptop": replace(
        catalog.ONE_MODEL,
        eval_sets=(
            catalog.dataset("tiny_world"),
            *(
                DatasetSpec(name=name, source=f"{BUILTIN}{name}", rewriting_of="tiny_world")
                for name in ("tiny_world_reworded", "tiny_world_other_words")
            ),
        ),
        seeds=(0, 1, 2),
    ),
}


def mitigation(chosen: Selection) -> Sweep:
    """Every model with every reward type and every share of copies."""
    # Copies would not be in the draw that a set declares for itself.
    eval_sets = [replace(item, train_draw=None) for item in chosen.eval_sets]
    trials: list[TrialSpec] = []
    for original in (replace(item, train_draw=None) for item in chosen.train_sets):
        rewritings = [item for item in eval_sets if item.rewriting_of == original.name]
        if len(rewritings) < 2:
            raise SpecError(
                f"--eval-sets holds {len(rewritings)} rewritings of {original.name}; two are needed: the first gives the copies, "
                "the others are what is asked about."
            )
        others = [item for item in eval_sets if item != rewritings[0]]
        for trial in chosen.trials(train_sets=(original,), eval_sets=others):
            trials += [_with_copies(trial, rewritings[0], share) for share in SHARES]
    return chosen.sweep(trials)


def _with_copies(trial: TrialSpec, rewriting: DatasetSpec, share: float) -> TrialSpec:
    """Share 0 is the set itself, so that its trainings are those of every other sweep."""
    added = Augmentation(source=rewriting.source, split=rewriting.train_split, share=share) if share else None
    train_set = replace(trial.train_set, augmentation=added)
    return replace(trial, train_set=train_set, axes=(*trial.axes, ("copies", share)))


if __name__ == "__main__":
    main(Grid(build=mitigation, profiles=PROFILES), __file__, __doc__)
