"""Remedies for IM-RM beside what they are to mend: does any of them close the gap to EX-RM?

    ex_rm, im_rm               as in the grid
    im_rm_no_reference         what the remedy without a reference is to be compared with
    im_rm_logits               the logits without the log-softmax, and without a reference
    im_rm_length_normalised    the mean over the response's tokens

python sweeps/remedies.py --profile laptop
python sweeps/remedies.py

A mean is shorter than a sum by the length of a response, so its β is larger by a usual length: rewards begin alike. So it
is for each β that --axis gives; the name has the β of the mean.
"""

from dataclasses import replace

from orchestrator.cli.main import Grid, main
from orchestrator.spec import catalog
from orchestrator.spec.axes import varied
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, TrialSpec
from trainers.specs import BUILTIN

# Tokens of a response, of the tiny world and of what the paper trains on.
TINY_LENGTH, USUAL_LENGTH = 3, 200
REWARDS = ("ex_rm", "im_rm", "im_rm_no_reference", "im_rm_logits", "im_rm_length_normalised")
PROFILES = {
    "paper": replace(catalog.PAPER, rewards=REWARDS),
    "laptop": replace(catalog.ONE_MODEL, seeds=(0, 1, 2), rewards=REWARDS),
}


def remedies(chosen: Selection) -> Sweep:
    """Every reward type on every model and training set, each mean with its larger β."""
    return chosen.sweep(map(_scaled, chosen.trials()))


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
