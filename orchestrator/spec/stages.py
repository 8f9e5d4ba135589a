"""The stages of a trial, in order, as plain values: what there is to compute, under which key, after what.

    convert, pretrain → sample → prepare → reference → train → evaluate

A TrialPlan holds the stages of one trial; an AnalyseStage reads what trials computed. Each stage is computed once,
whoever asks (orchestrator/run/compute.py), and is done when its artifact is committed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Union

from orchestrator.spec.keys import Keyed, changed, content_key
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One split of a data set, known by the digest of its rows; counts those that give no margin or no rewriting.

    The rows of answers are drawn by the stage `sampled`, and known by its key.
    """

    name: str
    split: str
    digest: str
    rows: int
    without_margin: int = 0
    without_rewriting: int = 0
    sampled: "SampleStage | None" = None

    @property
    def kind(self) -> str:
        """The kind of the artifact that holds its rows."""
        return "dataset" if self.sampled is None else self.sampled.kind

    @property
    def fetched(self) -> bool:
        """Whether its rows have been read; a split that is planned without them has a digest that no rows have."""
        return self.rows > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertStage(Keyed):
    """The conversion of a GGUF file to safetensors."""

    file: str
    digest: str
    name: str
    kind = "convert"

    def _content_key(self) -> str:
        return content_key(self.kind, versions.CONVERT, gguf=self.digest)

    @property
    def label(self) -> str:
        return f"convert {self.name}"

    needs: ClassVar["tuple[Stage, ...]"] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainStage(Keyed):
    """A built-in tiny model, pretrained on the tiny world."""

    model: TinyModel
    name: str
    kind = "pretrain"

    def _content_key(self) -> str:
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
        """Whether it is known which weights these are; False only for a hub model of unknown revision."""
        return bool(self.origin or self.revision or Path(self.location).is_absolute())

    def found_at(self, store: Store) -> str:
        """Folder or hub id to load it from."""
        if self.origin is None:
            return self.location
        return str(store.read(self.origin.kind, self.origin.key) / "model")

    @property
    def needs(self) -> "tuple[Stage, ...]":
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
        """The stage that makes the tokenizer, which a built-in one needs not, and the one that draws the rows."""
        tokenizer = () if isinstance(self.base.origin, PretrainStage) else self.base.needs
        return (*tokenizer, *filter(None, [self.split.sampled]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStage(Keyed):
    """Answers of a policy to the prompts of a split, drawn once for all reward models.

    `draw` says which prompts are asked. `ends` are the tokens that end an answer where the policy's key does not cover them.
    """

    base: BaseModel
    prompts: Split
    draw: DrawSpec
    sampling: SamplingSpec
    ends: tuple[int, ...] = ()
    kind = "sample"

    def _content_key(self) -> str:
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
        """The answers as rows to score: distinct ones, two a row."""
        prompts = min(self.prompts.rows, self.draw.max_pairs or self.prompts.rows)
        rows = prompts * -(-self.sampling.samples // 2)
        name = f"answers of {self.base.name} to {self.prompts.name}"
        return Split(name=name, split="answers", digest=self.key, rows=rows, sampled=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceStage(Keyed):
    """Reference log-probs of a base model on a prepared set."""

    base: BaseModel
    prepared: PrepareStage
    kind = "reference"

    def _content_key(self) -> str:
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
    loss: LossSpec = field(default=BRADLEY_TERRY, metadata=ADDED)
    lora: LoraSpec | None = field(default=None, metadata=ADDED)
    kind = "train"

    def _content_key(self) -> str:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateStage(Keyed):
    """Scores of a trained model on one evaluation set, after one of its epochs (from 1)."""

    train: TrainStage
    prepared: PrepareStage
    reference: ReferenceStage | None
    epoch: int
    kind = "evaluate"

    def _content_key(self) -> str:
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

    `answers` are evaluations, too, of what a policy has answered: no label says which answer is better, so no accuracy is
    told of them. `gold` is the reward model that may say so. `architecture` is that of its model where it is known, told
    since a node may not see what the driver sees.
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
        """Stages not in the store that this trial needs, in an order in which they can run.

        A training whose weights were evicted is one of them only where an evaluation of it is.
        """
        wanted = self.unscored(store)
        untrained = [] if store.complete(self.train.kind, self.train.key) else [self.train]
        return list(_below([*untrained, *wanted], lambda stage: stage not in wanted and usable(stage, store)))

    def unscored(self, store: Store) -> list[EvaluateStage]:
        """Evaluations that are missing, or that scored earlier weights."""
        keys = unscored(store, self.key, [stage.key for stage in self.scored])
        return [stage for stage in self.scored if stage.key in keys]

    def trains_again_s(self, store: Store) -> float | None:
        """Seconds that training again will take, where evicted weights are needed; None where they are not."""
        trained = store.sound_manifest(self.train.kind, self.train.key)
        if trained is None or store.complete(WEIGHTS, self.key) or self.complete(store):
            return None
        return float(trained["seconds"])

    def complete(self, store: Store) -> bool:
        return not self.missing(store)

    def stages(self) -> list[Stage]:
        """Every stage of this trial, in an order in which they can run."""
        return list(_below([self.train, *self.scored], lambda stage: False))


def usable(stage: Stage, store: Store) -> bool:
    """Whether a later stage can read this one: it is committed, and so are the weights of a training."""
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
    eval_sets = [
        # A suite has its numbers of all its prompts.
        prepare(
            split, replace(spec.eval_draw, max_pairs=None) if item.selection in SUITES else spec.eval_draw
        )
        for split, item in zip(eval_splits, spec.eval_sets, strict=True)
    ]
    evaluations = tuple(
        EvaluateStage(train=train, prepared=item, reference=reference(item), epoch=epoch)
        for epoch in (*kept, last)
        for item in eval_sets
    )
    answered = [prepare(sample.answers, replace(spec.eval_draw, max_pairs=None))] if sample else []
    answers = tuple(
        EvaluateStage(train=train, prepared=item, reference=reference(item), epoch=last) for item in answered
    )
    return TrialPlan(spec=spec, train=train, evaluations=evaluations, answers=answers, gold=gold)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyseStage(Keyed):
    """One analysis: `parameters` is a frozen dataclass; `prepared` are the pairs that it reads, by the name it has for them.

    `reads` are trainings and evaluations of a sweep, in the order in which the analysis wants them. `compute` fills the
    attempt's folder, summary.md and results.json at the least; what it notes goes into the manifest.
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

    def _content_key(self) -> str:
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
    """What an analysis computes from: where the model is (folder or hub id, with its revision), and tokenised pairs.

    From `store` it may read what its parameters name by key. What it `say`s appears on the terminal while it computes.
    """

    name: str
    location: str
    base: BaseModel | None
    pairs: dict[str, list[Any]]
    store: Store
    say: Callable[[str], None]


Compute = Callable[[AnalyseStage, AnalysisInputs, Attempt], None]
# Declares the analyses that follow a sweep, from its trials.
FollowUp = Callable[[Sequence[TrialPlan]], Sequence[AnalyseStage]]
