"""The stages of a trial, in order, as plain values: what there is to compute, under which key, after what.

    convert, pretrain → prepare → reference → train → evaluate

Computing them is compute.py's; each is computed once, whoever asks, and is done when its artifact is committed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from orchestrator.artifacts import Store
from orchestrator.spec import TrialSpec, content_key
from trainers import tiny, versions
from trainers.rewards import Rendering, RewardSpec
from trainers.specs import UNTRUSTED, DrawSpec, OptimSpec, Precision, Trust
from trainers.tiny import TinyModel


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


class _Keyed:
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

    def _content_key(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertStage(_Keyed):
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
class PretrainStage(_Keyed):
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
class PrepareStage(_Keyed):
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
            # Prepared sets were keyed before there was a choice.
            **({} if self.rendering == "response" else {"rendering": self.rendering}),
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
class ReferenceStage(_Keyed):
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
class TrainStage(_Keyed):
    """One training: weights and log. No evaluation set is in its key."""

    base: BaseModel
    prepared: PrepareStage
    reference: ReferenceStage | None
    reward: RewardSpec
    optim: OptimSpec
    seed: int
    kind = "train"

    def _content_key(self) -> str:
        """Hash of model, pairs, reward, optimiser, precision and seed; placement is not in it."""
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
class EvaluateStage(_Keyed):
    """Scores of a trained model on one evaluation set, after its last epoch."""

    train: TrainStage
    prepared: PrepareStage
    reference: ReferenceStage | None
    kind = "evaluate"

    def _content_key(self) -> str:
        """Hash of training, epoch and prepared set."""
        return content_key(
            self.kind,
            versions.EVALUATE,
            train=self.train.key,
            epoch=self.train.optim.epochs,
            data=self.prepared.key,
            reference=self.reference and self.reference.key,
        )

    @property
    def label(self) -> str:
        """For people."""
        return f"evaluate on {self.prepared.split.name}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """The training, the pairs, and for im_rm their reference log-probs."""
        reference = () if self.reference is None else (self.reference,)
        return (self.train, self.prepared, *reference)


Stage = Union[ConvertStage, PretrainStage, PrepareStage, ReferenceStage, TrainStage, EvaluateStage]
SharedStage = Union[ConvertStage, PretrainStage, PrepareStage, ReferenceStage]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """A trial as the stages that it comes to; `key` is that of its training."""

    spec: TrialSpec
    train: TrainStage
    evaluations: tuple[EvaluateStage, ...]

    @property
    def key(self) -> str:
        """The trial's identity: its training's key."""
        return self.train.key

    def missing(self, store: Store) -> list[Stage]:
        """Stages not in the store that this trial needs, in an order in which they can run.

        A training whose weights were evicted is one of them only where an evaluation of it is.
        """
        wanted = [stage for stage in self.evaluations if not store.complete(stage.kind, stage.key)]
        untrained = [] if store.complete(self.train.kind, self.train.key) else [self.train]
        return list(_below([*untrained, *wanted], lambda stage: _usable(stage, store)))

    def trains_again_s(self, store: Store) -> float | None:
        """Seconds that the training took whose weights were evicted and are needed again; None where none are."""
        evicted = store.evicted(self.train.kind, self.train.key)
        if evicted is None or self.complete(store):
            return None
        return float(evicted["train_seconds"])

    def complete(self, store: Store) -> bool:
        """Whether nothing is missing."""
        return not self.missing(store)

    def stages(self) -> list[Stage]:
        """Everything that this trial comes to, in an order in which it can run."""
        return list(_below([self.train, *self.evaluations], lambda stage: False))


def _usable(stage: Stage, store: Store) -> bool:
    """Whether what needs the stage can read it: committed, and its weights not evicted."""
    if not store.complete(stage.kind, stage.key):
        return False
    return stage.kind != "train" or store.evicted(stage.kind, stage.key) is None


def _below(stages: Sequence[Stage], done: Callable[[Stage], bool]) -> Iterator[Stage]:
    """The stages and what they need that is not `done`, each once and after its needs."""
    seen: set[str] = set()

    def visit(stage: Stage) -> Iterator[Stage]:
        if stage.key in seen or done(stage):
            return
        seen.add(stage.key)
        for need in stage.needs:
            yield from visit(need)
        yield stage

    for stage in stages:
        yield from visit(stage)


def plan_trial(
    spec: TrialSpec, base: BaseModel, train_split: Split, eval_splits: Sequence[Split]
) -> TrialPlan:
    """The stages of one trial."""

    def prepare(split: Split, draw: DrawSpec) -> PrepareStage:
        return PrepareStage(base=base, split=split, draw=draw, rendering=spec.reward.type.rendering)

    def reference(prepared: PrepareStage) -> ReferenceStage | None:
        return ReferenceStage(base=base, prepared=prepared) if spec.reward.uses_reference else None

    prepared = prepare(train_split, spec.train_draw)
    train = TrainStage(
        base=base,
        prepared=prepared,
        reference=reference(prepared),
        reward=spec.reward,
        optim=spec.optim,
        seed=spec.seed,
    )
    eval_sets = [prepare(split, spec.eval_draw) for split in eval_splits]
    evaluations = tuple(
        EvaluateStage(train=train, prepared=item, reference=reference(item)) for item in eval_sets
    )
    return TrialPlan(spec=spec, train=train, evaluations=evaluations)
