"""Reward types (paper §3): one file each, registered by being here.

A new type is a file in this folder whose `REWARD_TYPE` says what it needs and how a micro-batch is scored, and a
line in the tests. Importing this package and its files imports no torch, so that planning is quick.
"""

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainers.errors import SpecError
from trainers.options import ADDED

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.packing import MicroBatch

# Which output layer a model is loaded with: a new linear head, or its own unembedding.
Output = Literal["head", "unembedding"]
# What is tokenised: prompt and response, or the question whether a response is correct.
Rendering = Literal["response", "verification"]
Pooling = Literal["last", "mean"]
# Paper §1.
PAPER_BETA = 0.01


class PairScores(NamedTuple):
    """Rewards of the preferred and dispreferred responses of P pairs, and the loss of each pair."""

    chosen_P: "Tensor"
    rejected_P: "Tensor"
    loss_P: "Tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """A reward type with its options; an option that the type does not have is refused.

    `beta` scales a log-ratio; `pooling` is over the response's hidden states; `reference` says whether the
    log-probability of the untrained model is subtracted.
    """

    kind: str
    beta: float | None = None
    pooling: Pooling = field(default="last", metadata=ADDED)
    reference: bool = field(default=True, metadata=ADDED)

    def __post_init__(self) -> None:
        options = reward_type(self.kind).options
        if "beta" in options:
            usable = self.beta is not None and math.isfinite(self.beta) and self.beta > 0
            if not usable:
                raise SpecError(f"{self.kind} needs a positive beta, not {self.beta}.")
        for option, default in (("beta", None), ("pooling", "last"), ("reference", True)):
            if option not in options and getattr(self, option) != default:
                raise SpecError(f"{self.kind} has no {option}.")

    @property
    def type(self) -> "RewardType":
        """What the kind means."""
        return reward_type(self.kind)

    @property
    def uses_reference(self) -> bool:
        """Whether scoring needs the reference model's log-prob sums."""
        return "reference" in self.type.options and self.reference

    @property
    def name(self) -> str:
        """`ex_rm`, or with what differs from the kind's usual form: `ex_rm_mean`, `im_rm_no_reference`."""
        parts = [self.kind]
        parts += ["mean"] if self.pooling == "mean" else []
        parts += ["no_reference"] if not self.reference else []
        return "_".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardType:
    """What a reward type needs, and `score(model, batch, spec)`: the rewards and losses of a micro-batch.

    `options` are the fields of RewardSpec that it has; `usage` says in a model card how the reward is read.
    """

    kind: str
    output: Output
    score: "Callable[[Any, MicroBatch, RewardSpec], PairScores]"
    usage: Callable[[RewardSpec], str]
    rendering: Rendering = "response"
    options: frozenset[str] = frozenset()


def reward_variants(beta: float) -> dict[str, RewardSpec]:
    """Every reward type and its ablations by name; `beta` is that of every one with a β."""
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
    """Every reward type by its kind, in the order of their names."""
    modules = [
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    ]
    types: list[RewardType] = [module.REWARD_TYPE for module in modules]
    return MappingProxyType({reward.kind: reward for reward in types})


def reward_type(kind: str) -> RewardType:
    """The reward type of that kind. Raises SpecError."""
    try:
        return reward_types()[kind]
    except KeyError:
        raise SpecError(f"reward type {kind!r} is not one of {', '.join(reward_types())}.") from None
