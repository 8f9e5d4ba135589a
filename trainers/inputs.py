"""What a training is given."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainers.packing import References
from trainers.pairs import TokenPair
from trainers.rewards import RewardSpec
from trainers.specs import UNTRUSTED, OptimSpec, Placement, Precision, Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """Everything a rank needs; `location` and `revision` say where the base model is, `name` what it is called.

    After `keep_epochs` (from 1, the last not among them) the weights are kept as well. `validation` pairs are scored
    after every epoch; `reference` covers them.
    """

    name: str
    location: str
    revision: str | None
    precision: Precision
    reward: RewardSpec
    optim: OptimSpec
    placement: Placement
    seed: int
    pairs: Sequence[TokenPair]
    reference: References | None
    trust: Trust = UNTRUSTED
    keep_epochs: tuple[int, ...] = ()
    validation: Sequence[TokenPair] = ()
