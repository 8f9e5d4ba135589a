"""The paper's grid: language models × {EX-RM, IM-RM} × seeds × training sets, evaluated under every shift.

python sweeps/full_grid.py --profile laptop     built-in tiny models, minutes on two CPU cores
python sweeps/full_grid.py                      the six models of the paper where the cluster holds them
python sweeps/full_grid.py plan --models NAME=PATH --train-sets DIR --eval-sets DIR
"""

from orchestrator.cli.main import Grid, main
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, grid, only


def full_grid(chosen: Selection) -> Sweep:
    """Every model with every reward type on every training set at every seed."""
    trials = grid(
        models=chosen.models,
        rewards=chosen.rewards,
        train_sets=chosen.train_sets,
        eval_sets=chosen.eval_sets,
        seeds=chosen.seeds,
        recipe=chosen.recipe,
        train_draw=chosen.train_draw,
        eval_draw=chosen.eval_draw,
        keep_epochs=chosen.keep_epochs,
    )
    return Sweep(
        name=chosen.name,
        trials=only(trials, chosen.only)[: chosen.max_trials],
        categories=chosen.categories,
        placements=chosen.placements,
    )


if __name__ == "__main__":
    main(Grid(build=full_grid), __file__, __doc__)
