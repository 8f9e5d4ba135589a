"""Reward types (paper §3): every file of this folder but losses.py defines one.

Its `REWARD_TYPE` says what the type needs and how it scores a micro-batch; a new type also needs a line in the tests.
Importing this package and its files imports no torch, so that planning is quick.
"""

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from trainers.errors import SpecError
from trainers.specs import BRADLEY_TERRY, LossSpec, Output, Rendering

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.pairs.packing import MicroBatch

Pooling = Literal["last", "mean"]
# The values of tokens that a reward with an unembedding is computed from.
Read = Literal["log_probs", "logits"]
# Paper §1.
PAPER_BETA = 0.01


class BatchScores(NamedTuple):
    """Rewards of the preferred and dispreferred responses of P pairs, and the loss of each pair."""

    chosen_P: "Tensor"
    rejected_P: "Tensor"
    loss_P: "Tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """A reward type with its options; options that the type does not have are refused.

    `beta` scales a log-ratio; `pooling` is over the response's tokens; `reference` subtracts the log-probability under
    the untrained model.
    """

    kind: str
    beta: float | None = None
    pooling: Pooling = "last"
    reference: bool = True

    def __post_init__(self) -> None:
        options = reward_type(self.kind).options
        if "beta" in options and not 0 < (self.beta or 0) < math.inf:
            raise SpecError(f"{self.kind} needs a positive beta, not {self.beta}.")
        if self.pooling not in get_args(Pooling):
            raise SpecError(f"pooling {self.pooling!r} is not one of {', '.join(get_args(Pooling))}.")
        for option, default in (("beta", None), ("pooling", "last"), ("reference", True)):
            if option not in options and getattr(self, option) != default:
                raise SpecError(f"{self.kind} has no {option}.")

    @property
    def type(self) -> "RewardType":
        """The reward type of this kind."""
        return reward_type(self.kind)

    @property
    def uses_reference(self) -> bool:
        """Whether scoring needs the reference model's log-prob sums."""
        return "reference" in self.type.options and self.reference

    @property
    def name(self) -> str:
        """The kind, followed by its ablation: `ex_rm`, `ex_rm_mean`, `im_rm_no_reference`."""
        parts = [self.kind]
        parts += ["mean"] if self.pooling == "mean" else []
        parts += ["no_reference"] if not self.reference else []
        return "_".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardType:
    """What a reward type needs, and `score(model, batch, spec)`, which returns the rewards of P pairs.

    `score` returns rewards of the chosen, [P], and of the rejected responses, [P]. A type with a loss of its own
    (`own_loss`) returns BatchScores; others are trained with a loss of losses.py. `options` are the fields of RewardSpec
    that it has; `formula` is the reward as a model card has it, whose code computes what the type `reads`.
    """

    kind: str
    output: Output
    score: "Callable[[Any, MicroBatch, RewardSpec], tuple[Tensor, Tensor] | BatchScores]"
    formula: str
    rendering: Rendering = "response"
    options: frozenset[str] = frozenset()
    own_loss: bool = False
    reads: Read = "log_probs"

    def require_takes(self, loss: LossSpec, *, ties: bool = False) -> None:
        """Raise SpecError if the type has a loss of its own and another is asked for, or if the loss takes no ties."""
        if self.own_loss and (loss != BRADLEY_TERRY or ties):
            raise SpecError(
                f"{self.kind} has a loss of its own, so none of --loss, --margin, --label-smoothing, --centring, --consistency "
                "and --ties goes with it; leave them out, or use another reward type."
            )
        if ties and (loss.kind != "bradley_terry" or loss.margin):
            given = f"--margin {loss.margin}" if loss.margin else f"--loss {loss.kind}"
            raise SpecError(
                f"--ties and {given}: a tie is a label of ½, which is Bradley–Terry's alone, and has no margin; leave out one."
            )


def reward_variants(beta: float) -> dict[str, RewardSpec]:
    """Return every reward type and its ablations by name, with this `beta` where a type has one."""
    found: list[RewardSpec] = []
    for kind, reward in reward_types().items():
        usual = RewardSpec(kind=kind, beta=beta if "beta" in reward.options else None)
        found.append(usual)
        if "pooling" in reward.options:
            found.append(replace(usual, pooling="mean"))
        if "reference" in reward.options:
            found.append(replace(usual, reference=False))
    return {spec.name: spec for spec in found}


@functools.cache
def reward_types() -> Mapping[str, RewardType]:
    """Return every reward type by its kind, in the order of their names."""
    names = [found.name for found in pkgutil.iter_modules(__path__) if found.name != "losses"]
    types: list[RewardType] = [importlib.import_module(f"{__name__}.{name}").REWARD_TYPE for name in names]
    return MappingProxyType({reward.kind: reward for reward in types})


def reward_type(kind: str) -> RewardType:
    """Return the reward type of that kind. Raises SpecError."""
    try:
        return reward_types()[kind]
    except KeyError:
        raise SpecError(f"reward type {kind!r} is not one of {', '.join(reward_types())}.") from None
