"""The paper's grid: language models × {EX-RM, IM-RM} × seeds × training sets, evaluated under every shift.

python sweeps/full_grid.py --profile laptop     built-in tiny models, minutes on two CPU cores
python sweeps/full_grid.py                      the six models of the paper where the cluster holds them
python sweeps/full_grid.py plan --models NAME=PATH --train-sets DIR --eval-sets DIR
"""

from orchestrator.cli.main import Grid, main
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep


def full_grid(chosen: Selection) -> Sweep:
    """Every model with every reward type on every training set at every seed."""
    return chosen.sweep(chosen.trials())


if __name__ == "__main__":
    main(Grid(build=full_grid), __file__, __doc__)
