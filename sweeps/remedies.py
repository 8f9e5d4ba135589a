"""Remedies for IM-RM: does any of them close the gap to EX-RM?

    ex_rm, im_rm               as in the grid
    im_rm_no_reference         what the remedy without a reference is to be compared with
    im_rm_logits               the logits without the log-softmax, and without a reference
    im_rm_length_normalised    the mean over the response's tokens
    im_rm_hybrid               the log-ratio and EX-RM's head
    … consistency=C            ex_rm and im_rm with a term for the rewritings beside the training pairs, where they have any

python sweeps/remedies.py --profile laptop
python sweeps/remedies.py
python sweeps/remedies.py --train-sets FILE --axis ex_rm.consistency=0,1 im_rm.consistency=0,100

A mean is shorter than a sum by the length of a response, so its β is larger by a usual length: rewards begin alike. So it
is for each β that --axis gives; the name has the β of the mean.
"""

from dataclasses import replace

from orchestrator.cli.main import Grid, main
from orchestrator.spec import catalog
from orchestrator.spec.axes import varied
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, TrialSpec
from trainers.specs import BUILTIN, DatasetSpec

# Tokens of a response, of the tiny world and of what the paper trains on.
TINY_LENGTH, USUAL_LENGTH = 3, 200
REWARDS = ("ex_rm", "im_rm", "im_rm_no_reference", "im_rm_logits", "im_rm_length_normalised", "im_rm_hybrid")
# IM-RM's rewards, β times a log-ratio, are the smaller ones.
CONSISTENCY = {"ex_rm": 1.0, "im_rm": 100.0}
TINY = DatasetSpec(name="tiny_world_with_rewording", source=f"{BUILTIN}tiny_world_with_rewording")
PROFILES = {
    "paper": replace(catalog.PAPER, rewards=REWARDS),
    "laptop": replace(
        catalog.ONE_MODEL,
        seeds=(0, 1, 2),
        rewards=REWARDS,
        train_sets=(TINY,),
        eval_sets=(
            TINY,
            *(
                DatasetSpec(name=name, source=f"{BUILTIN}{name}", rewriting_of=TINY.name)
                for name in ("tiny_world_reworded", "tiny_world_other_words")
            ),
        ),
    ),
}


def remedies(chosen: Selection) -> Sweep:
    """Every reward type on every model and training set, each mean with its larger β."""
    trials = [*map(_scaled, chosen.trials())]
    consistent = [
        varied(trial, {"consistency": CONSISTENCY[trial.reward.name]})
        for trial in trials
        if trial.train_set == TINY and trial.reward.name in CONSISTENCY and not trial.loss.consistency
    ]
    return chosen.sweep(dict.fromkeys([*trials, *consistent]))


def _scaled(trial: TrialSpec) -> TrialSpec:
    if trial.reward.kind != "im_rm_length_normalised" or not trial.reward.beta:
        return trial
    length = TINY_LENGTH if trial.model.source.startswith(BUILTIN) else USUAL_LENGTH
    beta = trial.reward.beta * length
    if "beta" in dict(trial.axes):
        return varied(trial, {"beta": float(f"{beta:.6g}")})
    return replace(trial, reward=replace(trial.reward, beta=beta))


if __name__ == "__main__":
    main(Grid(build=remedies, profiles=PROFILES), __file__, __doc__)
