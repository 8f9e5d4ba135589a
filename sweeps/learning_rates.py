"""Is one learning rate fair to both reward types? The grid at several rates; held-out training pairs choose the best.

A quarter of the training pairs is held out of every training and scored after each epoch. The report has a row for each
rate, with the accuracy on held-out pairs after the last epoch, and says which rate is the best by them; no evaluation set
has a say in it. A training that diverges is a hole of the sweep.

python sweeps/learning_rates.py --profile laptop
python sweeps/learning_rates.py report --by lr
"""

from orchestrator.cli.main import Grid, main
from orchestrator.spec import catalog
from orchestrator.spec.axes import varied
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep
from trainers.errors import SpecError

# Multiples of the learning rate of the profile, or of --lr.
MULTIPLES = (0.2, 1.0, 5.0, 20.0)

PROFILES = {"paper": catalog.PAPER, "laptop": catalog.ONE_MODEL}


def learning_rates(chosen: Selection) -> Sweep:
    """The grid along an axis of learning rates: multiples of its own rate, unless --axis gives rates."""
    trials = chosen.trials(axes={"validation-share": (0.25,)})
    if not all(trial.validation for trial in trials):
        raise SpecError(
            "--validation-share 0: held-out pairs choose the best rate; give a share of the pairs."
        )
    given = [trial for trial in trials if "lr" in dict(trial.axes)]
    multiples = (
        varied(trial, {"lr": float(f"{multiple * trial.optim.lr:.6g}")})
        for multiple in MULTIPLES
        for trial in trials
        if trial not in given
    )
    return chosen.sweep([*given, *multiples])


if __name__ == "__main__":
    main(Grid(build=learning_rates, profiles=PROFILES), __file__, __doc__)
