"""The paper's ablations (paper §3) and its reviewers' controls (paper §6): what does the gap depend on?

    ex_rm, im_rm               as in the grid, to compare with
    ex_rm_mean                 the mean over the response's tokens, not its last token
    im_rm_no_reference         without the reference model
    ex_grm                     the probability of "Yes" to the question whether the response is correct
    ex_rm freeze=backbone      what the untrained hidden states are worth to a head
    im_rm freeze=backbone      what they are worth to an unembedding
    im_rm freeze=unembedding   all but the unembedding is trained

python sweeps/ablations.py --profile laptop
python sweeps/ablations.py --only freeze=backbone reward=?x_rm reward=im_rm

Beside a frozen backbone the output layer has a learning rate of its own, unless you give one. A built-in model knows no
word of EX-GRM's question, so that one needs `--models` of your own or the paper's.
"""

from dataclasses import replace

from orchestrator.cli.main import Grid, main
from orchestrator.spec import catalog
from orchestrator.spec.axes import varied
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, TrialSpec
from trainers.specs import BUILTIN

# At the grid's rate an output layer hardly leaves its initial values (paper §6): Adam moves an entry by at most
# rate × steps. At these, 36 steps on the laptop and 315 in the paper, that is fifteen times the head's initial
# standard deviation; one rate for both reward types.
FROZEN_LR, FROZEN_LR_TINY = 1e-3, 1e-2
# Reward type, and what is frozen.
VARIANTS = (("ex_rm", "backbone"), ("im_rm", "backbone"), ("im_rm", "unembedding"))
REWARDS = ("ex_rm", "im_rm", "ex_rm_mean", "im_rm_no_reference", "ex_grm")
PROFILES = {
    "paper": replace(catalog.PAPER, rewards=REWARDS),
    "laptop": replace(catalog.ONE_MODEL, seeds=(0, 1, 2), rewards=REWARDS),
}


def ablations(chosen: Selection) -> Sweep:
    """Every reward type, and the frozen variants of EX-RM and IM-RM."""
    trials: list[TrialSpec] = []
    asked = [point for choice in chosen.axes.choices for point in choice.points if "lr" in point.values]
    for model in chosen.models:
        wordless = model.source.startswith(BUILTIN)
        rewards = [reward for reward in chosen.rewards if not (wordless and reward.kind == "ex_grm")]
        trials += (whole := chosen.trials(models=(model,), rewards=rewards))
        for name, frozen in VARIANTS:
            for trial in (trial for trial in whole if trial.reward.name == name):
                own_rate = frozen == "backbone" and not any(point.fits(trial) for point in asked)
                rate = {"lr": FROZEN_LR_TINY if wordless else FROZEN_LR} if own_rate else {}
                trials.append(varied(trial, {"freeze": (frozen,)}, rate))
    return chosen.sweep(dict.fromkeys(trials))


if __name__ == "__main__":
    main(Grid(build=ablations, profiles=PROFILES), __file__, __doc__)
