"""The stages of a trial as plain values: each has a key and knows the stages that it needs.

    convert, pretrain → sample → prepare → reference → train → evaluate

A TrialPlan holds the stages of one trial; an AnalyseStage reads what trials computed. A stage is computed once for all
sweeps (orchestrator/run/compute.py), and is done when its artifact is committed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Union

from orchestrator.spec.keys import changed, content_key
from orchestrator.spec.trials import TrialSpec
from orchestrator.store.artifacts import WEIGHTS, Attempt, Store
from orchestrator.store.records import unscored
from trainers import versions
from trainers.evaluate.suites import SUITES
from trainers.models import tiny
from trainers.models.architecture import Architecture
from trainers.models.tiny import TinyModel
from trainers.rewards import RewardSpec
from trainers.rewards.losses import require_columns
from trainers.specs import (
    ADDED,
    BRADLEY_TERRY,
    UNTRUSTED,
    DrawSpec,
    LoraSpec,
    LossSpec,
    OptimSpec,
    Precision,
    Rendering,
    SamplingSpec,
    Trust,
    ValidationSpec,
)

if TYPE_CHECKING:
    from trainers.models.generation import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One split of a data set, known by the digest of its rows; counts those that give no margin or no rewriting.

    `mixed` are the digests of the sets that a mixture is made of. The key of the stage `sampled` identifies answers.
    """

    name: str
    split: str
    digest: str
    rows: int = 0
    without_margin: int = 0
    without_rewriting: int = 0
    mixed: tuple[str, ...] = ()
    sampled: "SampleStage | None" = None

    @property
    def kind(self) -> str:
        """The kind of the artifact that holds its rows."""
        return "dataset" if self.sampled is None else self.sampled.kind

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The artifacts that hold its rows and those of the sets that it mixes."""
        return (f"{self.kind}/{self.digest}", *(f"dataset/{digest}" for digest in self.mixed))

    @property
    def fetched(self) -> bool:
        """Whether its rows have been read; until then its digest is a placeholder."""
        return self.rows > 0


@dataclass(frozen=True, kw_only=True)
class ConvertStage:
    """The conversion of a GGUF file to safetensors."""

    file: str
    digest: str
    name: str
    kind = "convert"
    needs: ClassVar["tuple[Stage, ...]"] = ()

    @cached_property
    def key(self) -> str:
        return content_key(self.kind, versions.CONVERT, gguf=self.digest)

    @property
    def label(self) -> str:
        return f"convert {self.name}"


@dataclass(frozen=True, kw_only=True)
class PretrainStage:
    """A built-in tiny model, pretrained on the tiny world."""

    model: TinyModel
    name: str
    kind = "pretrain"

    @cached_property
    def key(self) -> str:
        return content_key(self.kind, tiny.VERSION, model=self.model)

    @property
    def label(self) -> str:
        return f"pretrain {self.name}"

    needs: ClassVar["tuple[Stage, ...]"] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A base model by its key; its weights are at `location`, or in the artifact of `origin`."""

    name: str
    key: str
    tokenizer_key: str
    precision: Precision
    location: str = ""
    revision: str | None = None
    origin: ConvertStage | PretrainStage | None = None
    trust: Trust = UNTRUSTED
    template: str | None = None

    @property
    def fetched(self) -> bool:
        """Whether its weights are identified; False only for a hub model of unknown revision."""
        return bool(self.origin or self.revision or Path(self.location).is_absolute())

    def found_at(self, store: Store) -> str:
        """Folder or hub id to load it from."""
        if self.origin is None:
            return self.location
        return str(store.read(self.origin.kind, self.origin.key) / "model")

    def weights(self, location: str) -> "Weights":
        """Return how the model, which is at `location`, is loaded."""
        from trainers.models.generation import Weights

        return Weights(
            location=location,
            revision=self.revision,
            precision=self.precision,
            trust=self.trust,
            template=self.template,
        )

    @property
    def needs(self) -> "tuple[Stage, ...]":
        return () if self.origin is None else (self.origin,)


@dataclass(frozen=True, kw_only=True)
class PrepareStage:
    """Tokenised pairs of a drawn split; shared by all models with one tokenizer."""

    base: BaseModel
    split: Split
    draw: DrawSpec
    rendering: Rendering = "response"
    kind = "prepare"

    @cached_property
    def key(self) -> str:
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
        return f"prepare {self.split.name}/{self.split.split}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        """The stage that makes the tokenizer, unless it is built in, and the stage that samples the rows."""
        tokenizer = () if isinstance(self.base.origin, PretrainStage) else self.base.needs
        return (*tokenizer, *filter(None, [self.split.sampled]))


@dataclass(frozen=True, kw_only=True)
class SampleStage:
    """Answers of a policy to the prompts of a split, drawn once for all reward models.

    `draw` selects the prompts. `ends` are the tokens that end an answer, unless the policy's key covers them.
    """

    base: BaseModel
    prompts: Split
    draw: DrawSpec
    sampling: SamplingSpec
    ends: tuple[int, ...] = ()
    kind = "sample"

    @cached_property
    def key(self) -> str:
        return content_key(
            self.kind,
            versions.SAMPLE,
            model=self.base.key,
            precision=self.base.precision,
            tokenizer=self.base.tokenizer_key,
            prompts=self.prompts.digest,
            draw=self.draw,
            sampling=self.sampling,
            ends=self.ends,
        )

    @property
    def label(self) -> str:
        return f"sample {self.answers.name}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        return self.base.needs

    @property
    def answers(self) -> Split:
        """The distinct answers as rows to score, two in each."""
        prompts = min(self.prompts.rows, self.draw.max_pairs or self.prompts.rows)
        rows = prompts * -(-self.sampling.samples // 2)
        name = f"answers of {self.base.name} to {self.prompts.name}"
        return Split(name=name, split="answers", digest=self.key, rows=rows, sampled=self)


@dataclass(frozen=True, kw_only=True)
class ReferenceStage:
    """Reference log-probs of a base model on a prepared set."""

    base: BaseModel
    prepared: PrepareStage
    kind = "reference"

    @cached_property
    def key(self) -> str:
        return content_key(
            self.kind,
            versions.REFERENCE,
            model=self.base.key,
            precision=self.base.precision,
            data=self.prepared.key,
        )

    @property
    def label(self) -> str:
        return f"reference {self.base.name} on {self.prepared.split.name}/{self.prepared.split.split}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        return (*self.base.needs, self.prepared)


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """One training: weights and log. No evaluation set is in its key."""

    base: BaseModel
    prepared: PrepareStage
    reference: ReferenceStage | None
    reward: RewardSpec
    optim: OptimSpec
    seed: int
    keep_epochs: tuple[int, ...] = ()
    validation: ValidationSpec | None = None
    loss: LossSpec = field(default=BRADLEY_TERRY, metadata=ADDED)
    lora: LoraSpec | None = field(default=None, metadata=ADDED)
    kind = "train"

    @cached_property
    def key(self) -> str:
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
            **changed(self),
        )

    @property
    def label(self) -> str:
        return f"train {self.reward.name} on {self.base.name}, {self.prepared.split.name}, seed {self.seed}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        return (*self.base.needs, self.prepared, *filter(None, [self.reference]))


@dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    """Scores of a trained model on one evaluation set, after one of its epochs (from 1)."""

    train: TrainStage
    prepared: PrepareStage
    reference: ReferenceStage | None
    epoch: int
    kind = "evaluate"

    @cached_property
    def key(self) -> str:
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
        after = f" after epoch {self.epoch}" if self.epoch < self.train.optim.epochs else ""
        return f"evaluate on {self.prepared.split.name}{after}"

    @property
    def needs(self) -> "tuple[Stage, ...]":
        # An adapter is loaded on its base model.
        base = self.train.base.needs if self.train.lora else ()
        return (*base, self.train, self.prepared, *filter(None, [self.reference]))


SharedStage = Union[ConvertStage, PretrainStage, SampleStage, PrepareStage, ReferenceStage]
Stage = Union[SharedStage, TrainStage, EvaluateStage]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """A trial as its stages; its key is that of its training.

    `answers` are evaluations of a policy's answers: no label says which answer is better, so they have no accuracy. `gold`
    is the reward model that may say so. `architecture` is the trained model's, if known: the driver notes it, since a node
    may not see the model's files.
    """

    spec: TrialSpec
    train: TrainStage
    evaluations: tuple[EvaluateStage, ...]
    answers: tuple[EvaluateStage, ...] = ()
    gold: BaseModel | None = None
    architecture: Architecture | None = None

    @property
    def scored(self) -> tuple[EvaluateStage, ...]:
        """Everything that the trained model scores."""
        return self.evaluations + self.answers

    @property
    def key(self) -> str:
        return self.train.key

    def missing(self, store: Store) -> list[Stage]:
        """Return the stages that this trial still needs, in an order in which they can run.

        A training whose weights were evicted counts only where one of its evaluations is missing.
        """
        wanted = self.unscored(store)
        untrained = [] if store.complete(self.train.kind, self.train.key) else [self.train]
        return list(_below([*untrained, *wanted], lambda stage: stage not in wanted and usable(stage, store)))

    def unscored(self, store: Store) -> list[EvaluateStage]:
        """Evaluations that are missing, or that scored earlier weights."""
        keys = unscored(store, self.key, [stage.key for stage in self.scored])
        return [stage for stage in self.scored if stage.key in keys]

    def trains_again_s(self, store: Store) -> float | None:
        """Return how long the training took if it must run again for its evicted weights, else None."""
        trained = store.sound_manifest(self.train.kind, self.train.key)
        if trained is None or store.complete(WEIGHTS, self.key) or self.complete(store):
            return None
        return float(trained["seconds"])

    def complete(self, store: Store) -> bool:
        return not self.missing(store)

    def stages(self) -> list[Stage]:
        """Return every stage of this trial, in an order in which they can run."""
        return list(_below([self.train, *self.scored], lambda stage: False))


def usable(stage: Stage, store: Store) -> bool:
    """Whether a later stage can read this one: it is committed, a training with its weights."""
    kinds = (stage.kind, WEIGHTS) if stage.kind == "train" else (stage.kind,)
    return all(store.complete(kind, stage.key) for kind in kinds)


def _below(stages: Sequence[Stage], done: Callable[[Stage], bool]) -> Iterator[Stage]:
    """Yield the stages and what they need, each once and after its needs; stop at what is `done`."""
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
    spec: TrialSpec,
    base: BaseModel,
    train_split: Split,
    eval_splits: Sequence[Split],
    sample: SampleStage | None = None,
    gold: BaseModel | None = None,
) -> TrialPlan:
    def prepare(split: Split, draw: DrawSpec) -> PrepareStage:
        return PrepareStage(base=base, split=split, draw=draw, rendering=spec.reward.type.rendering)

    def reference(prepared: PrepareStage) -> ReferenceStage | None:
        return ReferenceStage(base=base, prepared=prepared) if spec.reward.uses_reference else None

    last = spec.optim.epochs
    kept = tuple(sorted({epoch for epoch in spec.keep_epochs if epoch < last}))
    require_columns(
        spec.loss,
        f"data set {train_split.name}",
        train_split.rows,
        without_margin=train_split.without_margin,
        without_rewriting=train_split.without_rewriting,
    )
    prepared = prepare(train_split, spec.train_draw)
    train = TrainStage(
        base=base,
        prepared=prepared,
        reference=reference(prepared),
        reward=spec.reward,
        optim=spec.optim,
        seed=spec.seed,
        keep_epochs=kept,
        validation=spec.validation,
        loss=spec.loss,
        lora=spec.lora,
    )

    def evaluate(prepared: PrepareStage, epoch: int) -> EvaluateStage:
        return EvaluateStage(train=train, prepared=prepared, reference=reference(prepared), epoch=epoch)

    whole = replace(spec.eval_draw, max_pairs=None)
    eval_sets = [
        # A suite's score is defined over all of its prompts.
        prepare(split, whole if item.selection in SUITES else spec.eval_draw)
        for split, item in zip(eval_splits, spec.eval_sets, strict=True)
    ]
    evaluations = tuple(evaluate(item, epoch) for epoch in (*kept, last) for item in eval_sets)
    answers = (evaluate(prepare(sample.answers, whole), last),) if sample else ()
    return TrialPlan(spec=spec, train=train, evaluations=evaluations, answers=answers, gold=gold)


@dataclass(frozen=True, kw_only=True)
class AnalyseStage:
    """One analysis: `parameters` is a frozen dataclass; `prepared` are the pairs that it reads, by its own names for them.

    `reads` are trainings and evaluations of a sweep, in the order that the analysis wants. `compute` writes summary.md,
    results.json and any other files into the attempt's folder, and notes into the manifest.
    """

    analysis: str
    version: int
    compute: "Compute"
    parameters: Any
    base: BaseModel | None = None
    prepared: tuple[tuple[str, PrepareStage], ...] = ()
    reads: tuple[TrainStage | EvaluateStage, ...] = ()
    loads_weights: bool = False
    kind = "analyse"

    @cached_property
    def key(self) -> str:
        return content_key(
            self.kind,
            self.version,
            analysis=self.analysis,
            parameters=self.parameters,
            data={name: stage.key for name, stage in self.prepared},
            model=self.base and self.base.key,
            precision=self.base and self.base.precision,
            reads=[stage.key for stage in self.reads],
        )

    @property
    def label(self) -> str:
        return self.analysis if self.base is None else f"{self.analysis} of {self.base.name}"

    @property
    def needs(self) -> tuple[Stage, ...]:
        model = () if self.base is None else self.base.needs
        return (*model, *(stage for _, stage in self.prepared))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisInputs:
    """The inputs of an analysis: the model's place (folder or hub id) and tokenised pairs.

    It may read artifacts from `store` by the keys in its parameters.
    """

    name: str
    location: str
    base: BaseModel | None
    pairs: dict[str, list[Any]]
    store: Store


Compute = Callable[[AnalyseStage, AnalysisInputs, Attempt], None]
# Declares the analyses that follow a sweep, from its trials.
FollowUp = Callable[[Sequence[TrialPlan]], Sequence[AnalyseStage]]
