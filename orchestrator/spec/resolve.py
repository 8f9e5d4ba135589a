"""Turns a sweep into stages with keys: identifies every model and data set, and reports all faults at once."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from orchestrator.spec.datasets import DatasetReader
from orchestrator.spec.models import REVISION_LOCK, architecture_of, ending_tokens, identify_model
from orchestrator.spec.stages import SampleStage, Split, TrialPlan, plan_trial
from orchestrator.spec.trials import Sweep, TrialSpec
from orchestrator.store.artifacts import Store
from orchestrator.store.records import CATEGORIES, Category
from trainers.errors import DataError, ModelError, SpecError, SweepError
from trainers.specs import DatasetSpec

Named = TypeVar("Named")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSweep:
    """A sweep whose every trial is a list of keyed stages; `categories` is by (training set, evaluation set).

    `left_out` describes the bad rows that were left out, split by split.
    """

    sweep: Sweep
    plans: tuple[TrialPlan, ...]
    categories: dict[tuple[str, str], Category]
    left_out: tuple[str, ...] = ()


def resolve(sweep: Sweep, store: Store, *, fetch: bool = True, lock: Path = REVISION_LOCK) -> ResolvedSweep:
    """Identify every model and split of a sweep, and plan its trials.

    Raises ModelError, DataError or SpecError with every fault of its kind in one message.
    """
    trials = sweep.trials
    reader = DatasetReader(store, fetch=fetch)
    asked = {trial.answers for trial in trials if trial.answers}
    others = {model for item in asked for model in (item.policy, item.gold) if model}
    models = _all(
        {trial.model for trial in trials} | others,
        lambda model: identify_model(model, lock=lock, fetch=fetch),
        ModelError,
    )
    train_sets = {trial.train_set for trial in trials}
    eval_sets = {dataset for trial in trials for dataset in trial.eval_sets}
    wanted = {(dataset, dataset.train_split) for dataset in train_sets}
    wanted |= {(dataset, dataset.test_split) for dataset in eval_sets | {item.prompts for item in asked}}
    splits = _all(wanted, lambda item: reader.split(*item), DataError)
    train_splits = {dataset: splits[dataset, dataset.train_split] for dataset in train_sets}
    eval_splits = {dataset: splits[dataset, dataset.test_split] for dataset in eval_sets}
    _require_distinct_names(sweep)
    _require_layers(trials, fetch=fetch)
    overrides = {(train, evaluated): category for train, evaluated, category in sweep.categories}
    trained_on = {
        (reader.split(part, part.train_split).digest, dataset.name)
        for dataset in train_sets
        for part in (dataset, *dataset.parts)
    }
    _refuse_training_rows(trained_on, eval_splits, overrides)
    categories = {
        (train.name, evaluated.name): overrides.get((train.name, evaluated.name))
        or _category(train, evaluated, reader)
        for train in train_sets
        for evaluated in eval_sets
    }

    def sample(trial: TrialSpec) -> SampleStage | None:
        if trial.answers is None:
            return None
        return SampleStage(
            base=models[trial.answers.policy],
            prompts=splits[trial.answers.prompts, trial.answers.prompts.test_split],
            draw=replace(trial.eval_draw, max_pairs=trial.answers.max_prompts),
            sampling=trial.answers.sampling,
            ends=ends[trial.answers.policy],
        )

    policies = {item.policy for item in asked}
    ends = _all(policies, lambda model: ending_tokens(models[model], fetch=fetch), ModelError)
    plans = tuple(
        plan_trial(
            trial,
            models[trial.model],
            train_splits[trial.train_set],
            [eval_splits[item] for item in trial.eval_sets],
            sample(trial),
            models[trial.answers.gold] if trial.answers and trial.answers.gold else None,
        )
        for trial in trials
    )
    _require_distinct_keys(plans)
    return ResolvedSweep(sweep=sweep, plans=plans, categories=categories, left_out=reader.said_left_out())


def _all(wanted: set[Named], find: Callable[[Named], Found], kind: type[SweepError]) -> dict[Named, Found]:
    found: dict[Named, Found] = {}
    faults: list[str] = []
    for item in sorted(wanted, key=str):
        try:
            found[item] = find(item)
        except kind as error:
            faults.append(str(error))
    if faults:
        raise kind("\n".join(faults))
    return found


def _require_distinct_names(sweep: Sweep) -> None:
    # One model in two precisions is one model.
    models = {replace(trial.model, precision="fp32") for trial in sweep.trials}
    # One set with rewritten copies is one set.
    train_sets = {replace(trial.train_set, augmentation=None) for trial in sweep.trials}
    datasets = train_sets | {dataset for trial in sweep.trials for dataset in trial.eval_sets}
    for what, specs in (("models", models), ("data sets", datasets)):
        names = [spec.name for spec in specs]
        twice = sorted(f"{spec.name} ({spec.source})" for spec in specs if names.count(spec.name) > 1)
        if twice:
            raise SpecError(
                f"two {what} of one name: {', '.join(twice)}; tell them apart with NAME=PATH or NAME=ID."
            )


def _require_layers(trials: Sequence[TrialSpec], *, fetch: bool) -> None:
    """Refuse an adapter on layers that a model lacks, if that is known without running its code."""
    for (model, _), lora in {
        (trial.model, trial.lora.targets): trial.lora for trial in trials if trial.lora
    }.items():
        ask = not model.trust.trust_remote_code and (fetch or Path(model.source).exists())
        if shapes := architecture_of(model, ask=ask):
            lora.require_layers(f"model {model.name}", shapes.linear_layers)


def _require_distinct_keys(plans: Sequence[TrialPlan]) -> None:
    names: dict[str, str] = {}
    for plan in plans:
        if plan.key in names:
            raise SpecError(
                f"trials {names[plan.key]!r} and {plan.spec.name!r} are the same training; drop one."
            )
        names[plan.key] = plan.spec.name


def _refuse_training_rows(
    trained_on: set[tuple[str, str]],
    evaluated: dict[DatasetSpec, Split],
    declared: dict[tuple[str, str], Category],
) -> None:
    """Refuse to evaluate on the rows of a training, by digest, unless they are declared to be training pairs."""
    for (digest, trained), (dataset, split) in itertools.product(sorted(trained_on), evaluated.items()):
        if split.digest == digest and declared.get((trained, dataset.name)) != "training pairs":
            raise SpecError(
                f"evaluation set {dataset.name} holds the very rows that {trained} trains on; "
                f"give a folder with a test split, or --category {trained}/{dataset.name}=training-pairs."
            )


def _category(train: DatasetSpec, evaluated: DatasetSpec, reader: DatasetReader) -> Category:
    if train.mixture:
        return min((_category(part, evaluated, reader) for part in train.parts), key=CATEGORIES.index)
    if evaluated.rewriting_of == train.name:
        return "token-level shift"
    same_rows = (train.keep, train.selection) == (evaluated.keep, evaluated.selection)
    if same_rows and Path(train.source).resolve() == Path(evaluated.source).resolve():
        return "in-distribution"
    if reader.rewrites(evaluated, train):
        return "token-level shift"
    return "domain shift"


def missing_trials(plans: Sequence[TrialPlan], store: Store) -> tuple[TrialPlan, ...]:
    """Return the trials that lack an artifact."""
    keys = [plan.key for plan in plans]
    evaluations = [item.key for plan in plans for item in plan.scored]
    store.look(train=keys, weights=keys, evaluate=evaluations)
    return tuple(plan for plan in plans if not plan.complete(store))
