"""What a sweep's last command declared, as plain records in <storage>/sweeps/<sweep>/sweep.json.

The report, the status and MLflow are views of these records and of the artifacts that they name; gc keeps those.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from orchestrator.artifacts import Store
from orchestrator.redaction import redacted
from orchestrator.resolve import ResolvedSweep
from orchestrator.spec import Category
from orchestrator.stages import PrepareStage
from orchestrator.trial_plan import TrialPlan, unscored
from trainers.disk import replace
from trainers.errors import SpecError
from trainers.specs import DrawSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One evaluation of a trial; `dataset_digest` is that of the rows, `prepared` the key of their tokens.

    `epoch` is that after which it was evaluated, None where an older rmsweep has written the file: the last.
    """

    dataset: str
    key: str
    category: Category
    dataset_digest: str
    epoch: int | None = None
    prepared: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One cell: its labels, every parameter of its spec, and the keys of its artifacts; `prepared` is that of its pairs."""

    name: str
    key: str
    model: str
    reward: str
    train_set: str
    train_digest: str
    seed: int
    parameters: dict[str, Any]
    evaluations: tuple[EvaluationRecord, ...]
    prepared: str = ""

    def whole(self, store: Store) -> bool:
        """Whether it is trained, and evaluated on every declared set; no file but the manifests is read."""
        evaluated = not unscored(store, self.key, [item.key for item in self.evaluations])
        return evaluated and store.complete("train", self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """The sweep's trials, in plan order, and every artifact that they come to, as stage/key.

    `further` are those that only its analyses read. `artifacts` is None where an older rmsweep has written the file.
    """

    sweep: str
    trials: tuple[TrialRecord, ...]
    artifacts: tuple[str, ...] | None = None
    further: tuple[TrialRecord, ...] = ()


def declare(resolved: ResolvedSweep) -> Declaration:
    """The records of a resolved sweep."""
    # The same few words stand in every trial, and each is compared with the whole environment.
    said = cache(redacted)
    return Declaration(
        sweep=resolved.sweep.name,
        trials=tuple(_trial(plan, resolved.categories, said) for plan in resolved.plans),
        artifacts=tuple(sorted(artifacts_of(resolved.plans))),
    )


def with_further(
    declaration: Declaration, further: Sequence[TrialPlan], resolved: ResolvedSweep
) -> Declaration:
    """The declaration with trials that only analyses read, besides those that it has; their sets are those of the sweep."""
    said = cache(redacted)
    records = {trial.key: trial for trial in declaration.further}
    records |= {plan.key: _trial(plan, resolved.categories, said) for plan in further}
    return dataclasses.replace(
        declaration,
        further=tuple(records.values()),
        artifacts=tuple(sorted(artifacts_of(further).union(declaration.artifacts or ()))),
    )


def artifacts_of(plans: Iterable[TrialPlan]) -> set[str]:
    """Every artifact that the trials come to, as stage/key."""
    named: set[str] = set()
    for stage in (stage for plan in plans for stage in plan.stages()):
        named.add(f"{stage.kind}/{stage.key}")
        if isinstance(stage, PrepareStage):
            named.add(f"dataset/{stage.split.digest}")
    return named


def _trial(
    plan: TrialPlan, categories: Mapping[tuple[str, str], Category], said: Callable[[str], str]
) -> TrialRecord:
    spec = plan.spec
    return TrialRecord(
        name=spec.name,
        key=plan.key,
        model=spec.model.name,
        reward=spec.reward_name,
        train_set=spec.train_set.name,
        train_digest=plan.train.prepared.split.digest,
        seed=spec.seed,
        parameters=_parameters(plan, said),
        evaluations=tuple(
            EvaluationRecord(
                dataset=stage.prepared.split.name,
                key=stage.key,
                category=categories[spec.train_set.name, stage.prepared.split.name],
                dataset_digest=stage.prepared.split.digest,
                epoch=stage.epoch,
                prepared=stage.prepared.key,
            )
            for stage in plan.evaluations
        ),
        prepared=plan.train.prepared.key,
    )


def _parameters(plan: TrialPlan, said: Callable[[str], str]) -> dict[str, Any]:
    spec = plan.spec
    parameters: dict[str, Any] = {
        "model": spec.model.name,
        "model_source": spec.model.source,
        "model_revision": plan.train.base.revision,
        "precision": spec.model.precision,
        "reward": spec.reward_name,
        "beta": spec.reward.beta,
        "train_set": spec.train_set.name,
        "seed": spec.seed,
        "lr": spec.optim.lr,
        "epochs": spec.optim.epochs,
        "effective_batch": spec.optim.effective_batch,
        "weight_decay": spec.optim.weight_decay,
        "freeze": ", ".join(spec.optim.freeze) or None,
        "keep_epochs": " ".join(map(str, plan.train.keep_epochs)) or None,
        "max_train_pairs": spec.train_draw.max_pairs,
        "max_eval_pairs": spec.eval_draw.max_pairs,
        **{
            name: limit
            for name in ("max_prompt_tokens", "max_response_tokens")
            if (limit := getattr(spec.train_draw, name)) != getattr(DrawSpec(), name)
        },
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    return {name: said(value) if isinstance(value, str) else value for name, value in given.items()}


def write_declaration(declaration: Declaration, store: Store) -> None:
    """Make this what the sweep is from now on."""
    file = store.sweep_dir(declaration.sweep) / "sweep.json"
    replace(file, json.dumps(dataclasses.asdict(declaration), indent=1, ensure_ascii=False))


def read_declaration(sweep: str, store: Store) -> Declaration:
    """What the sweep's last command declared. Raises SpecError where there was none."""
    file = store.sweep_dir(sweep) / "sweep.json"
    if not file.is_file():
        raise SpecError(f"{store.root} knows no sweep {sweep!r}; run it first, or give --name or --storage.")
    loaded = json.loads(file.read_text())
    artifacts = loaded.get("artifacts")
    return Declaration(
        sweep=loaded["sweep"],
        trials=tuple(map(_read_trial, loaded["trials"])),
        artifacts=None if artifacts is None else tuple(artifacts),
        further=tuple(map(_read_trial, loaded.get("further", []))),
    )


def _read_trial(loaded: dict[str, Any]) -> TrialRecord:
    evaluations = tuple(EvaluationRecord(**item) for item in loaded["evaluations"])
    return TrialRecord(**{**loaded, "evaluations": evaluations})


def declared_sweeps(store: Store) -> list[str]:
    """Names of the sweeps that the store knows."""
    return sorted(file.parent.name for file in (store.root / "sweeps").glob("*/sweep.json"))
