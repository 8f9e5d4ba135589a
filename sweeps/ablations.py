"""The paper's ablations (paper §3) and its reviewers' controls (paper §6): what does the gap hang on?

    ex_rm, im_rm               as in the grid, to compare with
    ex_rm_mean                 the mean over the response's tokens, not its last token
    im_rm_no_reference         without the reference model
    ex_grm                     the probability of "Yes" to the question whether the response is correct
    ex_rm_head_only            frozen backbone: what the untrained hidden states are worth to a head
    im_rm_unembedding_only     frozen backbone: what they are worth to an unembedding
    im_rm_frozen_unembedding   all but the unembedding is trained

python sweeps/ablations.py --profile laptop
python sweeps/ablations.py --only reward=*_only reward=?x_rm reward=im_rm

A built-in model knows no word of EX-GRM's question, so that one needs `--models` of your own or the paper's.
"""

from collections.abc import Iterator
from dataclasses import replace

from orchestrator.cli.main import Grid, main
from orchestrator.spec import catalog
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Recipe, Sweep, TrialSpec, grid, only
from trainers.rewards import RewardSpec
from trainers.specs import BUILTIN, DatasetSpec, ModelSpec, OptimSpec, Part

# At the grid's rate an output layer hardly leaves its initial values (paper §6): Adam moves an entry by at most
# rate × steps. At these, 36 steps on the laptop and 315 in the paper, that is fifteen times the head's initial
# standard deviation; one rate for both reward types.
FROZEN_LR, FROZEN_LR_TINY = 1e-3, 1e-2

# By kind of reward: the variant's name, what is frozen, and whether only the output layer is left to train.
VARIANTS: dict[str, tuple[tuple[str, tuple[Part, ...], bool], ...]] = {
    "ex_rm": (("head_only", ("backbone",), True),),
    "im_rm": (
        ("unembedding_only", ("backbone",), True),
        ("frozen_unembedding", ("unembedding",), False),
    ),
}

REWARDS = ("ex_rm", "im_rm", "ex_rm_mean", "im_rm_no_reference", "ex_grm")
PAPER = replace(catalog.PAPER, rewards=REWARDS)
LAPTOP = replace(
    catalog.LAPTOP,
    models=(catalog.MODELS["llama-64"],),
    train_sets=(catalog.dataset("tiny_world"),),
    eval_sets=(catalog.dataset("tiny_world"), catalog.dataset("tiny_world_paraphrase")),
    seeds=(0, 1, 2),
    rewards=REWARDS,
    placements=(),
)
PROFILES = {"paper": PAPER, "laptop": LAPTOP}


def ablations(chosen: Selection) -> Sweep:
    """Every reward type that the model can give, and the frozen variants of the two that are compared."""
    trials = tuple(trial for model in chosen.models for trial in _trials_of(model, chosen))
    return Sweep(
        name=chosen.name,
        trials=only(trials, chosen.only)[: chosen.max_trials],
        categories=chosen.categories,
        placements=chosen.placements,
    )


def _trials_of(model: ModelSpec, chosen: Selection) -> Iterator[TrialSpec]:
    yield from _grid(model, [item for item in chosen.rewards if _asks_in_words(item, model)], chosen)
    for reward in chosen.rewards:
        if reward.name not in VARIANTS:
            continue
        for variant, frozen, alone in VARIANTS[reward.name]:
            yield from _grid(model, [reward], chosen, _frozen(chosen.recipe, frozen, alone), variant)


def _grid(
    model: ModelSpec,
    rewards: list[RewardSpec],
    chosen: Selection,
    recipe: Recipe | None = None,
    variant: str = "",
) -> tuple[TrialSpec, ...]:
    return grid(
        models=[model],
        rewards=rewards,
        train_sets=chosen.train_sets,
        eval_sets=chosen.eval_sets,
        seeds=chosen.seeds,
        recipe=recipe or chosen.recipe,
        train_draw=chosen.train_draw,
        eval_draw=chosen.eval_draw,
        keep_epochs=chosen.keep_epochs,
        variant=variant,
    )


def _asks_in_words(reward: RewardSpec, model: ModelSpec) -> bool:
    return reward.kind != "ex_grm" or not model.source.startswith(BUILTIN)


def _frozen(recipe: Recipe, frozen: tuple[Part, ...], alone: bool) -> Recipe:
    """The recipe with parts frozen; an output layer that is trained alone gets a rate that can move it."""

    def changed(model: ModelSpec, train_set: DatasetSpec) -> OptimSpec:
        optim = replace(recipe(model, train_set), freeze=frozen)
        if not alone:
            return optim
        return replace(optim, lr=FROZEN_LR_TINY if model.source.startswith(BUILTIN) else FROZEN_LR)

    return changed


if __name__ == "__main__":
    main(Grid(build=ablations, profiles=PROFILES), __file__, __doc__)
