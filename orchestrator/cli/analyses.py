"""Analyses: experiments that train nothing, and those that follow a trained grid.

An analysis is one artifact of kind `analyse`, with results.json, tables as parquet, figures as PNG and SVG, and summary.md.
Its key covers all its inputs, so it is computed once. The report and MLflow show a copy. Analyses run in this process,
without Ray.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from orchestrator.cli.options import CommonOptions, Gc, Plan, Report, Run, Sync, Ui, flag
from orchestrator.cli.running import show_report
from orchestrator.cli.session import HOLES, Session, dump_json, set_flags
from orchestrator.cli.terminal import quiet
from orchestrator.report.results import ScoredTrials, scored
from orchestrator.report.studies import Study, scored_of
from orchestrator.report.summary import Written
from orchestrator.run.failures import is_final, set_aside_damage
from orchestrator.run.inline import compute_analyses
from orchestrator.spec import selection
from orchestrator.spec.datasets import DatasetReader, ReadingOptions, read_as
from orchestrator.spec.declaration import adopt, adopted
from orchestrator.spec.models import identify_model
from orchestrator.spec.stages import (
    AnalyseStage,
    AnalysisInputs,
    Compute,
    EvaluateStage,
    PrepareStage,
    Stage,
    TrainStage,
    TrialPlan,
    usable,
)
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, read_state
from trainers.data.known import DATASETS, PERSONA
from trainers.errors import Damaged, SpecError
from trainers.specs import DatasetSpec, DrawSpec, Output, clean_name

KIND, SUMMARY, SEEN = "analyse", "summary.md", "seen"


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(CommonOptions):
    """The flags of every analysis."""

    command: Run | Plan | Report | Ui | Sync | Gc = field(default_factory=Run)


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(AnalysisOptions):
    """The flags of every study of a sweep's scores."""

    sweep: Annotated[str | None, flag("NAME", "the study's own")] = None
    """The sweep in the same storage whose scores are read."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ReadingOptions, AnalysisOptions):
    """The flags of every analysis of untrained models."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]ID|PATH")] = ("llama-64",)
    """Catalog names, hub ids, folders or GGUF files; one analysis each."""
    train_set: Annotated[str, tyro.conf.arg(metavar="[NAME=]NAME|PATH")] = "tiny_world"
    """The set whose training pairs count as seen; persona=FILE gives Persona's."""
    eval_sets: Annotated[
        tuple[str, ...], flag("[NAME=]NAME|PATH", "the training set and its paraphrases")
    ] = ()
    """Sets whose test pairs count as unseen."""
    max_train_pairs: Annotated[int | None, flag("N")] = None
    """Use the first N training pairs of a seeded permutation."""
    max_eval_pairs: Annotated[int | None, flag("N")] = None
    """Use the first N test pairs of a seeded permutation."""


@dataclass(frozen=True, kw_only=True)
class ScoredModelOptions(ModelOptions, ScoredOptions):
    """The flags of every study that reads a sweep's scores and the untrained models, on as many pairs as the sweep."""


Options = TypeVar("Options", bound=AnalysisOptions)


@dataclass(frozen=True, kw_only=True)
class Analyses(Generic[Options]):
    """An experiment without trials: its flags, and the function that turns them into analyses."""

    options: type[Options]
    declare: Callable[[Options, Session], Sequence[AnalyseStage]]

    def run(self, options: Options, session: Session) -> int:
        """Run the command and return its exit code."""
        command = options.command
        if isinstance(command, Plan | Report) and (ignored := set_flags(command)):
            raise SpecError(f"{', '.join(ignored)}: an analysis has no trials; leave out these flags.")
        stages = self.declare(options, session)
        if isinstance(command, Plan):
            return _plan(session, stages)
        # gc keeps these artifacts.
        artifacts = tuple(sorted({name for stage in stages for name in _artifacts(stage)}))
        declaration = Declaration(sweep=session.sweep_name, trials=(), artifacts=artifacts)
        if isinstance(command, Report | Sync):
            adopted(declaration, session.store)
            if isinstance(command, Report):
                return _report(session, stages)
            _show_in_mlflow(session, declaration, stages)
            return 0
        adopt(declaration, session.store)
        missing = [stage for stage in stages if not session.store.complete(stage.kind, stage.key)]
        session.say(f"{len(stages)} analyses, {len(stages) - len(missing)} complete")
        if missing:
            _compute(session, missing)
        code = _report(session, stages)
        if missing:
            _show_in_mlflow(session, declaration, stages)
        return code


def _compute(session: Session, stages: Sequence[AnalyseStage]) -> None:
    """Compute the analyses; what libraries print goes to the driver's log."""
    with quiet(session.driver_log, session.console.width):
        compute_analyses(stages, session.store)


def _plan(session: Session, stages: Sequence[AnalyseStage]) -> int:
    """Print which stages each analysis still needs."""
    store, rows = session.store, []
    for stage in stages:
        needed = () if store.complete(stage.kind, stage.key) else (*stage.needs, stage)
        missing = [item.kind for item in needed if not store.complete(item.kind, item.key)]
        rows.append({"analysis": stage.label, "key": stage.key, "missing": missing})
    if session.options.json:
        dump_json(rows)
        return 0
    for row in rows:
        session.say(f"{row['analysis']}  {row['key']}  missing: {', '.join(row['missing']) or 'nothing'}")
    return 0


def _report(session: Session, stages: Sequence[AnalyseStage]) -> int:
    """Write and print the report of the analyses; return HOLES where one is missing or incomplete."""
    folder = session.store.local_sweep_dir(session.sweep_name) / "report"
    complete = [stage for stage in stages if session.store.complete(stage.kind, stage.key)]
    # Of several analyses, each has a folder of its own.
    names = {stage.key: stage.base.name if stage.base else stage.analysis for stage in complete}
    places = {key: folder / name if len(stages) > 1 else folder for key, name in names.items()}
    results = _show(session, folder, places) if places else []
    if session.options.json:
        labelled = zip(complete, results, strict=True)
        dump_json([{"analysis": stage.label, "key": stage.key, **result} for stage, result in labelled])
    else:
        missing = (stage.label for stage in stages if stage not in complete)
        session.say(*(f"missing: {label}; `run` with the same flags computes it" for label in missing))
        session.say(*([f"report: {folder}"] if complete else []))
    return HOLES if len(complete) < len(stages) else 0


def _show(session: Session, folder: Path, places: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Fill `folder` with copies of analyses, by key and place, and print their summaries; return their results."""
    store, results = session.store, []
    # Earlier copies are deleted only once every artifact was read, since one may be damaged.
    artifacts = {key: _read(key, store) for key in places}
    shutil.rmtree(folder, ignore_errors=True)
    for key, (found, result) in artifacts.items():
        shutil.copytree(found, places[key], dirs_exist_ok=True)
        results.append(result)
        if not session.options.json:
            session.say((found / SUMMARY).read_text(), f"artifact: {KIND}/{key}")
    if places:
        store.share(folder)
    return results


def _read(key: str, store: Store) -> tuple[Path, dict[str, Any]]:
    """Return the folder of an analysis and its results; a damaged one is set aside. Raises Damaged."""
    try:
        found = store.read(KIND, key)
    except Damaged as error:
        set_aside_damage(error, store)
        raise
    return found, json.loads((found / "results.json").read_text())


def _artifacts(stage: Stage | AnalyseStage) -> Iterator[str]:
    """Yield the artifacts of a stage and of its inputs."""
    yield f"{stage.kind}/{stage.key}"
    if isinstance(stage, PrepareStage):
        yield from stage.split.artifacts
    for need in stage.needs:
        yield from _artifacts(need)


def _show_in_mlflow(session: Session, declaration: Declaration, stages: Sequence[AnalyseStage]) -> None:
    """Log the report on one run with the sweep's name."""
    folder = session.store.local_sweep_dir(session.sweep_name) / "report"
    complete = all(session.store.complete(stage.kind, stage.key) for stage in stages)
    show_report(session, declaration, Written(folder=folder, results=[]), complete=complete)


def with_analyses(declaration: Declaration, session: Session, plans: Sequence[TrialPlan]) -> Declaration:
    """Return the declaration with the artifacts of the analyses that follow the sweep."""
    if session.follow_up is None:
        return declaration
    named = {f"{KIND}/{stage.key}" for stage in session.follow_up(plans)}
    return dataclasses.replace(declaration, artifacts=tuple(sorted(named.union(declaration.artifacts))))


def run_follow_up(session: Session, declaration: Declaration, plans: Sequence[TrialPlan]) -> bool:
    """Compute the declared analyses that are missing and whose inputs are complete; return whether there was one.

    An analysis can be computed once what it reads is there. It goes on without a training that failed for good, and is
    computed again once that is there.
    """
    if session.follow_up is None:
        return False
    store, stages = session.store, session.follow_up(plans)
    for stage in stages:
        made = store.sound_manifest(stage.kind, stage.key)
        without = made["info"].get("without", ()) if made else ()
        if made and any(store.complete(*name.split("/")) for name in without):
            store.discard(stage.kind, stage.key, made["attempt"])
    notes = read_state(session.sweep_name, store).trials
    given_up = {key for key, note in notes.items() if is_final(note.cause)}

    def is_settled(read: TrainStage | EvaluateStage, loads_weights: bool) -> bool:
        training = read if isinstance(read, TrainStage) else read.train
        complete = usable(read, store) if loads_weights else store.complete(read.kind, read.key)
        return complete or training.key in given_up

    missing = [
        stage
        for stage in stages
        if f"{KIND}/{stage.key}" in declaration.artifacts
        and not store.complete(stage.kind, stage.key)
        and all(is_settled(read, stage.loads_weights) for read in stage.reads)
        and any(store.complete(read.kind, read.key) for read in stage.reads)
    ]
    if missing:
        _compute(session, missing)
    return bool(missing)


def show_analyses(session: Session, declaration: Declaration) -> None:
    """Copy the complete analyses that follow a sweep into its report, and print their summaries."""
    store = session.store
    folder = store.local_sweep_dir(declaration.sweep) / "report" / "analyses"
    keys = [key for kind, _, key in (item.partition("/") for item in declaration.artifacts) if kind == KIND]
    named = {_read(key, store)[1]["name"]: key for key in keys if store.complete(KIND, key)}
    _show(session, folder, {key: folder / clean_name(name) for name, key in sorted(named.items())})


def analyses_of(study: Study) -> Analyses[ScoredOptions]:
    """Return the experiment that studies one sweep's complete trials; it raises SpecError where none is complete."""

    def declare(options: ScoredOptions, session: Session) -> list[AnalyseStage]:
        return [_stage_of(study, scored(session.store, options.sweep or study.sweep))]

    return Analyses(options=ScoredOptions, declare=declare)


def analyses_of_models(study: Study) -> Analyses[ScoredModelOptions]:
    """Return the experiment that studies one sweep's complete trials on one training set, model by model."""

    def declare(options: ScoredModelOptions, session: Session) -> list[AnalyseStage]:
        sweep, stages = options.sweep or study.sweep, list[AnalyseStage]()
        trained = selection.parse_dataset(options.train_set, "--train-set").name
        names = [selection.parse_model(text).name for text in options.models]
        _require_apart("--models", names)
        for text, name in zip(options.models, names, strict=True):
            asked, drawn = scored_of(session.store, sweep, name, trained)
            limits = ("max_train_pairs", "max_eval_pairs")
            own: dict[str, Any] = {name: getattr(options, name) or drawn.get(name) for name in limits}
            own_options = dataclasses.replace(options, models=(text,), **own)
            (stage,) = _for_models(own_options, session, _stage_of(study, asked))
            ((_, seen), *_) = stage.prepared
            if other := [item.name for item in asked.trials if item.prepared not in ("", seen.key)]:
                raise SpecError(
                    f"--sweep {sweep}: {other[0]} was trained on other pairs or with another template than this analysis "
                    "reads; give its --max-train-pairs, or a sweep with the usual draw and template."
                )
            stages.append(stage)
        return stages

    return Analyses(options=ScoredModelOptions, declare=declare)


def _stage_of(study: Study, asked: ScoredTrials) -> AnalyseStage:
    return AnalyseStage(analysis=study.name, version=study.version, compute=study.compute, parameters=asked)


def analyses_of_untrained(
    name: str, version: int, compute: Compute, parameters: Any
) -> Analyses[ModelOptions]:
    """Return the experiment that looks at untrained models, one by one."""
    asked = AnalyseStage(analysis=name, version=version, compute=compute, parameters=parameters)
    return Analyses(options=ModelOptions, declare=lambda words, session: _for_models(words, session, asked))


def _for_models(options: ModelOptions, session: Session, asked: AnalyseStage) -> list[AnalyseStage]:
    """Return the analysis `asked` for each of the models, on their pairs. Raises SpecError, ModelError, DataError."""
    trained = selection.parse_dataset(options.train_set, "--train-set")
    unseen = [selection.parse_dataset(text, "--eval-sets") for text in options.eval_sets]
    names = [part.name for part in trained.parts]
    rewritings = [item for item in DATASETS if item.rewriting_of in names]
    (trained,), own = read_as([trained], unseen or [*trained.parts, *rewritings], options)
    # All sets of Persona are made of the same statements.
    unseen = [
        dataclasses.replace(item, source=trained.source) if item.selection == PERSONA else item
        for item in own
    ]
    models = [selection.parse_model(text) for text in options.models]
    _require_apart("--models", [item.name for item in models])
    _require_apart("--eval-sets", [item.name for item in unseen])
    drawn, most = trained.train_draw, options.max_train_pairs
    train_draw = drawn if drawn and most in (None, drawn.max_pairs) else DrawSpec(max_pairs=most)
    fetch = not isinstance(options.command, Plan)
    reader = DatasetReader(session.store, fetch=fetch)
    wanted: list[tuple[str, DatasetSpec, str, DrawSpec]] = [
        (SEEN, trained, trained.train_split, train_draw),
        *((item.name, item, item.test_split, DrawSpec(max_pairs=options.max_eval_pairs)) for item in unseen),
    ]
    lock = session.folder / "revisions.lock.json"
    stages = []
    for base in [identify_model(model, lock=lock, fetch=fetch) for model in models]:
        prepared = tuple(
            (name, PrepareStage(base=base, split=reader.split(dataset, split), draw=draw))
            for name, dataset, split, draw in wanted
        )
        stages.append(dataclasses.replace(asked, base=base, prepared=prepared))
    session.warn(*(() if options.json else reader.said_left_out()))
    return stages


def _require_apart(given: str, names: Sequence[str]) -> None:
    if len({SEEN, *names}) <= len(names):
        raise SpecError(
            f"{given}: two have the same name, or one is called seen; tell them apart with NAME=."
        )


def load_untrained(inputs: AnalysisInputs, output: Output) -> Any:
    """Load the base model in float64, on a GPU where there is one; the head of an EX-RM is drawn from seed 0."""
    assert inputs.base is not None
    weights = dataclasses.replace(inputs.base.weights(inputs.location), precision="fp32")
    return weights.model(output, head_seed=0).double()
