"""What a sweep's commands declare: its records made from its resolved trials, and how a declaration grows.

The report, the status and MLflow are views of these records and of the artifacts that they name; gc keeps those. A
declaration grows; it is replaced only where the user says so, and gc keeps what it needed even then.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from orchestrator.spec.axes import AXES, plain, shown
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
    # The same few words stand in every trial, and each is compared with the whole environment.
    said = cache(redacted)
    stages = [stage for plan in resolved.plans for stage in plan.stages()]
    artifacts = {f"{stage.kind}/{stage.key}" for stage in stages}
    splits = [stage.split for stage in stages if isinstance(stage, PrepareStage)]
    splits += [stage.prompts for stage in stages if isinstance(stage, SampleStage)]
    artifacts |= {f"{split.kind}/{split.digest}" for split in splits}
    return Declaration(
        sweep=resolved.sweep.name,
        trials=tuple(trial_record(plan, resolved.categories, said) for plan in resolved.plans),
        artifacts=tuple(sorted(artifacts)),
    )


def trial_record(
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
        axes={name: plain(value) for name, value in spec.axes},
        answers=tuple(stage.key for stage in plan.answers),
    )


def _parameters(plan: TrialPlan, said: Callable[[str], str]) -> dict[str, Any]:
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
    return {
        name: said(value) if isinstance(value, str) else value
        for name, value in parameters.items()
        if value is not None
    }


def adopt(
    new: Declaration, store: Store, *, adds: bool = False, replaces: bool = False, grows: bool = False
) -> Declaration:
    """Write what `adopted` returns. Of drivers that add to one sweep at a time none loses what another added."""
    with alone(store.local_sweep_dir(new.sweep) / "sweep.json"):
        declaration = adopted(new, store, adds=adds, replaces=replaces, grows=grows)
        write_declaration(declaration, store)
    return declaration


def adopted(
    new: Declaration, store: Store, *, adds: bool = False, replaces: bool = False, grows: bool = False
) -> Declaration:
    """The declaration that the sweep has from now on: `new`, which must hold all that was declared before.

    Where it `adds`, what it lacks stays declared; where it `grows`, too, but for evaluations on other pairs of the same rows, whose place
    it takes; where it `replaces`, only the artifacts stay. Raises SpecError.
    """
    if new.sweep not in declared_sweeps(store):
        return new
    earlier, adds = read_declaration(new.sweep, store), adds or grows
    both = _both(earlier, new)
    lacking = () if grows else _lost(earlier, both)
    clash = list(dict.fromkeys((*lacking, *_of_other_settings(earlier, new))))
    if (lost := clash if adds else _lost(earlier, new)) and not replaces:
        raise SpecError(_refusal(earlier, new, store, lost, can_extend=not clash))
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


def _of_other_settings(earlier: Declaration, new: Declaration) -> list[str]:
    """Trials of `new` that a mean over seeds or models would mix with earlier trials of other data or settings."""
    known, rows = _known_settings(earlier), _known_rows(earlier)
    return [
        trial.name
        for trial in new.trials
        if ((others := known.get(_group(trial))) and not any(_alike(other, trial) for other in others))
        or _of_other_rows(rows, trial)
    ]


def _group(trial: TrialRecord) -> tuple[str, str, str]:
    return trial.model, trial.reward, trial.train_set


def _alike(earlier: dict[str, Any], trial: TrialRecord) -> bool:
    settings = _settings(trial)
    # An earlier rmsweep noted no key of the model.
    return {"model_key": settings.get("model_key"), **earlier} == {"model_key": None, **settings}


def _known_settings(earlier: Declaration) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    known: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for trial in earlier.trials:
        known.setdefault(_group(trial), []).append(_settings(trial))
    return known


def _known_rows(earlier: Declaration) -> dict[str, str]:
    return {item.dataset: item.dataset_digest for other in earlier.trials for item in other.evaluations}


def _of_other_rows(rows: Mapping[str, str], trial: TrialRecord) -> bool:
    return any(
        rows.get(item.dataset, item.dataset_digest) != item.dataset_digest for item in trial.evaluations
    )


def _as_axes(earlier: Declaration, new: Declaration) -> str:
    """The words of --axis by which the new trials would have names of their own, where one value each tells them apart."""
    known, names = _known_settings(earlier), {axis.parameter: name for name, axis in AXES.items()}
    found: dict[str, set[str]] = {}
    for trial in new.trials:
        settings = _settings(trial)
        for name, value in known.get(_group(trial), [settings])[-1].items():
            if settings.get(name) != value:
                found.setdefault(names.get(name, ""), set()).add(shown(settings.get(name)))
    if "" in found or any(len(values) > 1 for values in found.values()):
        return ""
    rows = _known_rows(earlier)
    if any(_of_other_rows(rows, trial) for trial in new.trials):
        return ""
    return " ".join(f"{name}={value}" for name, (value,) in found.items())


def _settings(trial: TrialRecord) -> dict[str, Any]:
    apart = ("seed", "model_source", "keep_epochs", "max_eval_pairs")
    settings = {name: value for name, value in trial.parameters.items() if name not in apart}
    # None is not noted, nor is an axis that came to be after the sweep was declared.
    unsaid = {"template": None, **{axis.parameter: plain(axis.default) for axis in AXES.values()}}
    return {**unsaid, **settings, "train_digest": trial.train_digest}


def _both(earlier: Declaration, new: Declaration) -> Declaration:
    """The trials and evaluations of both, in the order in which they came; of two with one name the new one."""
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
        # In the report an analysis of some of the trials would stand in the place of that of all.
        artifacts = tuple(item for item in artifacts if not item.startswith("analyse/"))
    return dataclasses.replace(
        new,
        trials=tuple(sorted(trials.values(), key=lambda trial: place.get(trial.key, len(place)))),
        # Of two analyses with one name the report shows the one that was declared last.
        artifacts=tuple(dict.fromkeys((*earlier.artifacts, *sorted(artifacts)))),
    )


def _refusal(
    earlier: Declaration, new: Declaration, store: Store, lost: Sequence[str], *, can_extend: bool
) -> str:
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    taken = declared_sweeps(store)
    free = next(name for n in itertools.count(2) if (name := f"{new.sweep}-{n}") not in taken)
    ways = [f"give it a name of its own (--name {free})"]
    if new.trials:
        if can_extend:
            ways.append("add it to the sweep (--extend)")
        elif words := _as_axes(earlier, new):
            ways.append(f"add it with what is new in its trials' names (--axis {words} --extend)")
        ways += ["let it take the sweep's place (--replace)"]
    return (
        f"sweep {new.sweep} in {store.root} was declared with what this command lacks, or has with other data or "
        f"settings: {', '.join(lost[:3])}{more}. Nothing was started: {', or '.join(ways)}."
    )
