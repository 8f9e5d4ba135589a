"""The stages of a trial, in order, as plain values: what there is to compute, under which key, after what.

    convert, pretrain → prepare → reference → train → evaluate

Computing them is compute.py's; each is computed once, whoever asks, and is done when its artifact is committed.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from orchestrator.spec.trials import content_key
from orchestrator.store.artifacts import Store
from trainers import versions
from trainers.models import tiny
from trainers.models.tiny import TinyModel
from trainers.rewards import RewardSpec
from trainers.specs import UNTRUSTED, DrawSpec, OptimSpec, Precision, Rendering, Trust, ValidationSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One split of a data set, known by the digest of its rows."""

    name: str
    split: str
    digest: str
    rows: int

    @property
    def fetched(self) -> bool:
        """Whether its rows have been seen; planned without them, it has a digest that no rows have."""
        return self.rows > 0


class Keyed(ABC):
    """A value whose key is computed when it is first asked for, and kept: a sweep asks for each dozens of times."""

    __slots__ = ("_key",)
    _key: str

    @property
    def key(self) -> str:
        """Hash of exactly what can change the stage's result."""
        try:
            return self._key
        except AttributeError:
            object.__setattr__(self, "_key", self._content_key())
            return self._key

    @abstractmethod
    def _content_key(self) -> str:
        """Hash of what can change the stage's result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertStage(Keyed):
    """GGUF → safetensors."""

    file: str
    digest: str
    name: str
    kind = "convert"

    def _content_key(self) -> str:
        """Hash of the file's content."""
        return content_key(self.kind, versions.CONVERT, gguf=self.digest)

    @property
    def label(self) -> str:
        """For people."""
        return f"convert {self.name}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """Nothing."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainStage(Keyed):
    """A built-in tiny model, pretrained on the tiny world."""

    model: TinyModel
    name: str
    kind = "pretrain"

    def _content_key(self) -> str:
        """Hash of the model's configuration and of what it is pretrained on."""
        return content_key(self.kind, tiny.VERSION, model=self.model)

    @property
    def label(self) -> str:
        """For people."""
        return f"pretrain {self.name}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """Nothing."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A base model by its key; its weights are at `location`, or in the artifact of `origin`."""

    name: str
    key: str
    tokenizer_key: str
    precision: Precision
    location: str = ""
    revision: str | None = None
    origin: ConvertStage | PretrainStage | None
    trust: Trust = UNTRUSTED

    @property
    def fetched(self) -> bool:
        """Whether it is known which weights these are; only a hub model of unknown revision is not."""
        return bool(self.origin or self.revision or Path(self.location).is_absolute())

    def found_at(self, store: Store) -> str:
        """Folder or hub id to load it from."""
        if self.origin is None:
            return self.location
        return str(store.read(self.origin.kind, self.origin.key) / "model")

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """The stage that makes its weights, if one does."""
        return () if self.origin is None else (self.origin,)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareStage(Keyed):
    """Tokenised pairs of a drawn split; shared by all models with one tokenizer."""

    base: BaseModel
    split: Split
    draw: DrawSpec
    rendering: Rendering = "response"
    kind = "prepare"

    def _content_key(self) -> str:
        """Hash of rows, draw, tokenizer and what is rendered."""
        return content_key(
            self.kind,
            versions.PREPARE,
            dataset=self.split.digest,
            draw=self.draw,
            tokenizer=self.base.tokenizer_key,
            rendering=self.rendering,
        )

    @property
    def label(self) -> str:
        """For people."""
        return f"prepare {self.split.name}/{self.split.split}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """Where the tokenizer comes from; a built-in one needs no weights."""
        return () if isinstance(self.base.origin, PretrainStage) else self.base.needs


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceStage(Keyed):
    """Reference log-probs of a base model on a prepared set."""

    base: BaseModel
    prepared: PrepareStage
    kind = "reference"

    def _content_key(self) -> str:
        """Hash of model, precision and prepared set."""
        return content_key(
            self.kind,
            versions.REFERENCE,
            model=self.base.key,
            precision=self.base.precision,
            data=self.prepared.key,
        )

    @property
    def label(self) -> str:
        """For people."""
        return f"reference {self.base.name} on {self.prepared.split.name}/{self.prepared.split.split}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """The model and the pairs."""
        return (*self.base.needs, self.prepared)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStage(Keyed):
    """One training: weights and log. No evaluation set is in its key."""

    base: BaseModel
    prepared: PrepareStage
    reference: ReferenceStage | None
    reward: RewardSpec
    optim: OptimSpec
    seed: int
    keep_epochs: tuple[int, ...] = ()
    validation: ValidationSpec | None = None
    kind = "train"

    def _content_key(self) -> str:
        """Hash of model, pairs, reward, optimiser, precision, seed, kept epochs, validation; placement is not in it."""
        return content_key(
            self.kind,
            versions.TRAIN,
            model=self.base.key,
            precision=self.base.precision,
            data=self.prepared.key,
            reference=self.reference and self.reference.key,
            reward=self.reward,
            optim=self.optim,
            seed=self.seed,
            keep_epochs=self.keep_epochs,
            validation=self.validation,
        )

    @property
    def label(self) -> str:
        """For people."""
        return f"train {self.reward.name} on {self.base.name}, {self.prepared.split.name}, seed {self.seed}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """The model, the pairs, and for im_rm their reference log-probs."""
        reference = () if self.reference is None else (self.reference,)
        return (*self.base.needs, self.prepared, *reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateStage(Keyed):
    """Scores of a trained model on one evaluation set, after one of its epochs (from 1)."""

    train: TrainStage
    prepared: PrepareStage
    reference: ReferenceStage | None
    epoch: int
    kind = "evaluate"

    def _content_key(self) -> str:
        """Hash of training, epoch and prepared set."""
        return content_key(
            self.kind,
            versions.EVALUATE,
            train=self.train.key,
            epoch=self.epoch,
            data=self.prepared.key,
            reference=self.reference and self.reference.key,
        )

    @property
    def label(self) -> str:
        """For people."""
        after = f" after epoch {self.epoch}" if self.epoch < self.train.optim.epochs else ""
        return f"evaluate on {self.prepared.split.name}{after}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """The training, the pairs, and for im_rm their reference log-probs."""
        reference = () if self.reference is None else (self.reference,)
        return (self.train, self.prepared, *reference)


Stage = Union[ConvertStage, PretrainStage, PrepareStage, ReferenceStage, TrainStage, EvaluateStage]
SharedStage = Union[ConvertStage, PretrainStage, PrepareStage, ReferenceStage]
