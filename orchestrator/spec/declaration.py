"""What a sweep's commands declare: its records made from its resolved trials, and how a declaration grows.

The report, the status and MLflow are views of these records and of the artifacts that they name; gc keeps those. A
declaration grows; it is replaced only where the user says so, and gc keeps what it needed even then.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

from orchestrator.spec.axes import AXES, plain
from orchestrator.spec.keys import content_key
from orchestrator.spec.redaction import redacted
from orchestrator.spec.resolve import ResolvedSweep
from orchestrator.spec.stages import PrepareStage, SampleStage, TrialPlan
from orchestrator.store.artifacts import Store
from orchestrator.store.records import (
    Category,
    Declaration,
    EvaluationRecord,
    TrialRecord,
    declared_sweeps,
    read_declaration,
    write_declaration,
)
from trainers.errors import SpecError
from trainers.storage import alone


def declare(resolved: ResolvedSweep) -> Declaration:
    # Redacting compares a word with the whole environment, and trials share most words.
    said = cache(redacted)
    stages = [stage for plan in resolved.plans for stage in plan.stages()]
    artifacts = {f"{stage.kind}/{stage.key}" for stage in stages}
    splits = {stage.split for stage in stages if isinstance(stage, PrepareStage)}
    splits |= {stage.prompts for stage in stages if isinstance(stage, SampleStage)}
    artifacts |= {name for split in splits for name in split.artifacts}
    return Declaration(
        sweep=resolved.sweep.name,
        trials=tuple(trial_record(plan, resolved.categories, said) for plan in resolved.plans),
        artifacts=tuple(sorted(artifacts)),
    )


def trial_record(
    plan: TrialPlan, categories: Mapping[tuple[str, str], Category], said: Callable[[str], str]
) -> TrialRecord:
    spec, template = plan.spec, plan.spec.model.template
    parameters: dict[str, Any] = {
        "model": spec.model.name,
        "model_source": spec.model.source,
        "model_revision": plan.train.base.revision,
        "model_key": plan.train.base.key,
        "template": template
        and (template if "{" not in template else content_key("template", 1, text=template)),
        "reward": spec.reward_name,
        "train_set": spec.train_set.name,
        "seed": spec.seed,
        "keep_epochs": " ".join(map(str, plan.train.keep_epochs)) or None,
        "max_eval_pairs": spec.eval_draw.max_pairs,
        **{axis.parameter: plain(axis.of(spec)) for axis in AXES.values()},
    }
    return TrialRecord(
        name=spec.name,
        key=plan.key,
        model=spec.model.name,
        reward=spec.reward_name,
        train_set=spec.train_set.name,
        train_digest=plan.train.prepared.split.digest,
        seed=spec.seed,
        parameters={
            name: said(value) if isinstance(value, str) else value
            for name, value in parameters.items()
            if value is not None
        },
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
        axes={name: plain(value) for name, value in spec.axes},
        answers=tuple(stage.key for stage in plan.answers),
    )


def adopt(
    new: Declaration, store: Store, *, adds: bool = False, replaces: bool = False, grows: bool = False
) -> Declaration:
    """Write the declaration that `adopted` returns, under a lock: drivers may add to one sweep at the same time."""
    with alone(store.local_sweep_dir(new.sweep) / "sweep.json"):
        declaration = adopted(new, store, adds=adds, replaces=replaces, grows=grows)
        write_declaration(declaration, store)
    return declaration


def adopted(
    new: Declaration, store: Store, *, adds: bool = False, replaces: bool = False, grows: bool = False
) -> Declaration:
    """Return the sweep's declaration from now on: `new`, which must hold all that was declared before.

    With `adds`, what `new` lacks stays declared; with `grows`, too, but new evaluations replace those of other pairs of the
    same rows; with `replaces`, only the artifacts stay. Raises SpecError.
    """
    if new.sweep not in declared_sweeps(store):
        return new
    earlier, adds = read_declaration(new.sweep, store), adds or grows
    both = _both(earlier, new)
    clash = [*(() if grows else _lost(earlier, both)), *_clashes(earlier, new)]
    if (lost := clash if adds else _lost(earlier, new)) and not replaces:
        # An axis names a setting, and no change of data, model or template.
        named = not _clashes(earlier, new, apart={axis.parameter for axis in AXES.values()})
        way = "give what is new as an axis, which names it (--axis NAME=VALUE --extend)" if named else ""
        way = way if clash else "add it to the sweep (--extend)"
        raise SpecError(_refusal(new, store, list(dict.fromkeys(lost)), way))
    if adds and not replaces:
        new = both
    needed = {*earlier.artifacts, *earlier.earlier} - {*new.artifacts}
    return dataclasses.replace(new, earlier=tuple(sorted(needed)))


def _lost(earlier: Declaration, new: Declaration) -> list[str]:
    """Name the trials and evaluations that `earlier` declares and `new` does not."""
    kept = {trial.key: {item.key for item in trial.evaluations} for trial in new.trials}
    lost: list[str] = []
    for trial in earlier.trials:
        if trial.key not in kept:
            lost.append(trial.name)
            continue
        gone = [item.dataset for item in trial.evaluations if item.key not in kept[trial.key]]
        lost += [f"{trial.name} on {dataset}" for dataset in dict.fromkeys(gone)]
    return lost


def _clashes(earlier: Declaration, new: Declaration, apart: Collection[str] = ()) -> list[str]:
    """Name the new trials that a mean over seeds or models would mix with earlier ones of other settings or data.

    The settings `apart` are not compared.
    """
    known: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    rows = {item.dataset: item.dataset_digest for trial in earlier.trials for item in trial.evaluations}
    for trial in earlier.trials:
        known.setdefault((trial.model, trial.reward, trial.train_set), []).append(_settings(trial, apart))
    return [
        trial.name
        for trial in new.trials
        for here in [_settings(trial, apart)]
        if here not in known.get((trial.model, trial.reward, trial.train_set), [here])
        or any(
            rows.get(item.dataset, item.dataset_digest) != item.dataset_digest for item in trial.evaluations
        )
    ]


def _settings(trial: TrialRecord, apart: Collection[str] = ()) -> dict[str, Any]:
    apart = {"seed", "model_source", "keep_epochs", "max_eval_pairs", *apart}
    settings = {name: value for name, value in trial.parameters.items() if name not in apart}
    return {**settings, "train_digest": trial.train_digest}


def _both(earlier: Declaration, new: Declaration) -> Declaration:
    """Merge two declarations: earlier trials stand first, and a new trial takes the place of one with its name."""
    known = {trial.key: trial for trial in earlier.trials}
    added = {trial.key for trial in new.trials}
    trials = {trial.name: trial for trial in earlier.trials if trial.key not in added}
    for trial in new.trials:
        before = known[trial.key].evaluations if trial.key in known else ()
        evaluations = {(item.dataset, item.epoch): item for item in (*before, *trial.evaluations)}
        trials[trial.name] = dataclasses.replace(trial, evaluations=tuple(evaluations.values()))
    place = {key: index for index, key in enumerate(known)}
    artifacts = new.artifacts
    if added <= known.keys():
        # In the report, an analysis of some trials would take the place of the analysis of all.
        artifacts = tuple(item for item in artifacts if not item.startswith("analyse/"))
    return dataclasses.replace(
        new,
        trials=tuple(sorted(trials.values(), key=lambda trial: place.get(trial.key, len(place)))),
        # The report shows the last of two analyses with one name.
        artifacts=tuple(dict.fromkeys((*earlier.artifacts, *sorted(artifacts)))),
    )


def _refusal(new: Declaration, store: Store, lost: Sequence[str], way: str) -> str:
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    taken = declared_sweeps(store)
    free = next(name for n in itertools.count(2) if (name := f"{new.sweep}-{n}") not in taken)
    ways = [f"give it a name of its own (--name {free})"]
    if new.trials:
        ways += [way] if way else []
        ways.append("let it take the sweep's place (--replace)")
    return (
        f"sweep {new.sweep} in {store.root} was declared with what this command lacks, or has with other data or "
        f"settings: {', '.join(lost[:3])}{more}. Nothing was started: {', or '.join(ways)}."
    )
