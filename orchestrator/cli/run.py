"""What each command does, between the parsed flags and the exit code."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence

from orchestrator.cli import joining, outlook_table
from orchestrator.cli.follow_up import run_follow_up, show_analyses, with_analyses
from orchestrator.cli.inspect import gigabytes, say_damaged_logs, say_holes, warn
from orchestrator.cli.options import Plan, Run
from orchestrator.cli.running import Phases, Place, catch_up, run_missing, show_report
from orchestrator.cli.session import DEFECT, Session, dump_json, profile_for, say_left_out, select
from orchestrator.cli.terminal import late_bar
from orchestrator.cli.terminal_report import print_comparison, print_report, say_audit
from orchestrator.plan import placement
from orchestrator.plan.hardware import Node
from orchestrator.plan.outlook import architectures, outlook, too_long
from orchestrator.report.compare_sweeps import other_sweep, write_comparison
from orchestrator.report.page import write_full_report
from orchestrator.report.results import TrialResult, of_other_weights, sweep_results
from orchestrator.report.summary import accuracy_numbers
from orchestrator.run.compute import REAL
from orchestrator.run.failures import is_final
from orchestrator.run.hub_models import fetch_models
from orchestrator.spec.declaration import adopt, declare
from orchestrator.spec.models import denial, denied_models, require_access
from orchestrator.spec.redaction import redacted
from orchestrator.spec.resolve import ResolvedSweep, missing_trials, resolve
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import PrepareStage, TrialPlan
from orchestrator.spec.trials import Sweep
from orchestrator.store import gc
from orchestrator.store.records import Declaration, TrialNote, declared_sweeps, read_declaration, read_state
from trainers.errors import Damaged, SpecError, StorageError, SweepError
from trainers.specs import Placement
from trainers.storage import replace

Build = Callable[[Selection], Sweep]


def run(session: Session, build: Build) -> int:
    """Run what is missing, then report. Where the grid is narrowed, the sweep stays what it was declared to be."""
    options = session.options
    if options.extend and options.replace:
        raise SpecError(
            "--extend adds the grid to the sweep, --replace puts it in its place; give one of them."
        )
    phases = Phases()
    console = session.console
    sweep, resolved, place = _prepared(session, build)
    known = resolved.plans
    declaration = adopt(
        with_analyses(declare(resolved), session, known),
        session.store,
        adds=options.extend or _narrowed(session),
        replaces=options.replace,
    )
    say_damaged_logs(session, [item.key for item in resolved.plans])
    missing = missing_trials(known, session.store)
    notes = read_state(session.sweep_name, session.store).trials
    diverged = [item for item in missing if is_final(notes.get(item.key, TrialNote()).cause)]
    todo = [item for item in missing if item not in diverged]
    console.print(_headline(known, todo, session), highlight=False)
    say_left_out(session, resolved.left_out)
    if diverged:
        console.print(f"{len(diverged)} failed for good before and stay as they are; `retry` runs them again")
    say_damage(session, missing)
    if todo:
        say_audit(declaration, session.store, console)
    phases.end("plan")
    return _run(session, sweep, resolved, declaration, todo, place, phases)


def retry(session: Session, build: Build) -> int:
    """Run again the trials that failed, of those that the last command declared."""
    sweep, resolved, place = _prepared(session, build)
    declaration = read_declaration(session.sweep_name, session.store)
    notes = read_state(session.sweep_name, session.store).trials
    declared = {trial.key for trial in declaration.trials}
    failed = [
        item
        for item in missing_trials(resolved.plans, session.store)
        if item.key in declared and notes.get(item.key, TrialNote()).cause
    ]
    names = ", ".join(item.spec.name for item in failed)
    session.console.print(f"again: {names}" if failed else "no trial of these has failed", highlight=False)
    phases = Phases()
    phases.end("plan")
    return _run(session, sweep, resolved, declaration, failed, place, phases)


def _prepared(session: Session, build: Build) -> tuple[Sweep, ResolvedSweep, Place]:
    """The sweep, its stages, and what says where a trial is to be trained. Raises what the user has to mend.

    Scores that are not what was written are no longer in the store, so that they count as missing. Where nothing is
    left to run, no cluster is joined and no trial placed.
    """
    sweep = _sweep(session, build)
    complete = _resolved_if_complete(session, sweep)
    if complete is not None:
        return sweep, complete, functools.partial(_place, sweep, ())
    capacity = joining.joined(session) or joining.capacity(session)
    placement.require_fit(sweep.trials, capacity)
    require_access([trial.model for trial in sweep.trials])
    resolved = _resolve(session, sweep, fetch=True)
    if _set_aside(session, _rows_to_read(session, resolved.plans)):
        resolved = _resolve(session, sweep, fetch=True)
    known = architectures([trial.model for trial in sweep.trials], ask=any(node.gpus for node in capacity))
    plans = (dataclasses.replace(item, architecture=known[item.spec.model]) for item in resolved.plans)
    resolved = dataclasses.replace(resolved, plans=tuple(plans))
    for item in resolved.plans:
        # What fits nowhere is said before anything starts.
        _place(sweep, capacity, item)
    _set_aside(session, _scores(resolved.plans))
    return sweep, resolved, functools.partial(_place, sweep, capacity)


def _place(sweep: Sweep, capacity: Sequence[Node], item: TrialPlan) -> Placement:
    return placement.place(item.spec, capacity, sweep.placements, architecture=item.architecture)


def _resolved_if_complete(session: Session, sweep: Sweep) -> ResolvedSweep | None:
    """The sweep's stages where a cluster would be joined for none of them; what is damaged has to be made again."""
    if not joining.may_join(session) or session.sweep_name not in declared_sweeps(session.store):
        return None
    try:
        resolved = _resolve(session, sweep, fetch=False)
    except SweepError:
        # Said where it is resolved for good.
        return None
    _set_aside(session, _scores(resolved.plans))
    return None if missing_trials(resolved.plans, session.store) else resolved


def _run(
    session: Session,
    sweep: Sweep,
    resolved: ResolvedSweep,
    declaration: Declaration,
    todo: Sequence[TrialPlan],
    place: Place,
    phases: Phases,
) -> int:
    # Where there is no live table, each failure is said when it comes.
    told = [] if session.console.is_terminal else [item.key for item in todo]

    try:
        if todo:
            fetch_models_here(session, todo)
            done = len(resolved.plans) - len(todo)
            written = run_missing(session, declaration, todo, done, place, sweep.retries, phases)
        else:
            gc.clear_up(session.store, session.sweep_name)
            written = write_full_report(
                declaration, session.store, functools.partial(late_bar, session.console)
            )
            catch_up(session, declaration, written)
        computed = run_follow_up(session, declaration, resolved.plans)
        print_report(session, written)
        show_analyses(session, declaration)
        if computed:
            show_report(session, declaration, written)
        _evict_weights(session, _asked(session, resolved, written.results))
    except SweepError as error:
        # The user's own mistakes were refused above; what fails from here on is not one.
        session.console.print(
            f"error: {redacted(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        if not isinstance(error, StorageError):
            return DEFECT
        # Where there is no room for a report, the holes are told all the same.
        results = _asked(session, resolved, sweep_results(declaration, session.store))
        return say_holes(session, results, told=told) or DEFECT
    phases.end("report")
    if todo:
        file = session.store.sweep_dir(session.sweep_name) / "phases.json"
        replace(file, json.dumps(phases.seconds, indent=1))
    results = _asked(session, resolved, written.results)
    return say_holes(session, results, told=told)


def fetch_models_here(session: Session, todo: Sequence[TrialPlan]) -> None:
    """Fetch the hub's models that trials need, where this machine runs them: a cluster's nodes fetch for themselves."""

    def say(text: str, style: str) -> None:
        session.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    # Stages of a test or benchmark load no weights.
    if session.stages is REAL and not joining.may_join(session):
        fetch_models(todo, session.store, say)


def _narrowed(session: Session) -> bool:
    return bool(session.options.only or session.options.max_trials)


def _asked(session: Session, resolved: ResolvedSweep, results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the results that the command is about: a narrowed run answers for its own trials only."""
    if not (isinstance(session.options.command, Run) and _narrowed(session)):
        return list(results)
    mine = {item.key for item in resolved.plans}
    return [item for item in results if item.record.key in mine]


def plan_only(session: Session, build: Build) -> int:
    """Print what is missing, where it would run, how long and at what price; start nothing."""
    command = session.options.command
    price = outlook_table.checked_price(command.price if isinstance(command, Plan) else None)
    sweep = _sweep(session, build)
    resolved = _resolve(session, sweep, fetch=False)
    found = outlook(resolved, joining.capacity(session), session.store, price=price)
    long = too_long(resolved.plans, session.store)
    denied = denied_models([trial.model for trial in sweep.trials])
    if session.options.json:
        trials = [
            {
                "trial": item.spec.name,
                "missing": [stage.kind for stage in item.missing(session.store)],
                "trains_again_s": item.trains_again_s(session.store),
            }
            for item in resolved.plans
        ]
        left_out = [dataclasses.asdict(item) for item in long]
        dump_json(
            {**dataclasses.asdict(found), "too_long": left_out, "access_denied": denied, "trials": trials}
        )
        return 0
    say_left_out(session, resolved.left_out)
    outlook_table.say(session.console, found, len(resolved.plans))
    for item in long:
        session.console.print(str(item), style="yellow", markup=False, highlight=False, soft_wrap=True)
    if again := _trains_again(resolved.plans, session):
        session.console.print(again, highlight=False)
    if denied:
        session.console.print(denial(denied), style="yellow", markup=False, soft_wrap=True)
    return 0


def report(session: Session, compare: str | None) -> int:
    """Write and print the report of what the last command declared, and beside it that of another sweep."""
    declaration = read_declaration(session.sweep_name, session.store)
    other = None if compare is None else other_sweep(compare, session.store)
    written = write_full_report(
        declaration, session.store, functools.partial(late_bar, session.console), anew=True
    )
    beside = other and write_comparison(
        declaration, session.store, *other, functools.partial(late_bar, session.console)
    )
    if session.options.json:
        rows = accuracy_numbers(written.analysis).records()
        dump_json({"rows": rows, "comparison": beside.table.records()} if beside else rows)
        return 0
    print_report(session, written)
    show_analyses(session, declaration)
    if beside is not None:
        print_comparison(session, beside)
    return say_holes(session, written.results)


def _sweep(session: Session, build: Build) -> Sweep:
    """The sweep that the flags ask for; a cluster is only looked at where they leave the profile open."""
    capacity = joining.capacity(session) if session.options.profile == "auto" else ()
    profile, why = profile_for(session.options, capacity, session.profiles)
    if why and not session.options.json and not (session.options.models and session.options.train_sets):
        session.console.print(why, highlight=False)
    return build(select(session.options, profile, session.sweep_name))


def _resolve(session: Session, sweep: Sweep, *, fetch: bool) -> ResolvedSweep:
    return resolve(
        sweep,
        session.store,
        fetch=fetch,
        allow_overlap=session.options.allow_overlap,
        lock=session.folder / "revisions.lock.json",
    )


def _headline(plans: Sequence[TrialPlan], todo: Sequence[TrialPlan], session: Session) -> str:
    if not todo:
        return f"all {len(plans)} trials are complete in {session.store.root}; nothing to run"
    stages = {(stage.kind, stage.key) for item in todo for stage in item.missing(session.store)}
    kinds = [kind for kind, _ in sorted(stages)]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    done = f"{len(plans)} trials, {len(plans) - len(todo)} complete; to run: {counted}"
    return "; ".join(filter(None, (done, _trains_again(todo, session))))


def _trains_again(plans: Sequence[TrialPlan], session: Session) -> str:
    """Say how many trainings run a second time, and how long they took; "" where none does."""
    took_s = [took for item in plans if (took := item.trains_again_s(session.store)) is not None]
    return f"{len(took_s)} train again: weights evicted, took {sum(took_s):,.0f} s" if took_s else ""


def _evict_weights(session: Session, results: Sequence[TrialResult]) -> None:
    keep = session.options.keep_weights
    gone = gc.evictable(map(_ranked, results), keep)
    freed = gc.evict_weights(session.store, session.sweep_name, gone)
    if freed:
        said = f"{gigabytes(freed)} GB of weights evicted (--keep-weights {keep}); scores and logs stay"
        session.console.print(said, highlight=False, soft_wrap=True)


def _ranked(result: TrialResult) -> gc.Ranked:
    record, accuracies = result.record, [item.metrics["accuracy"] for item in result.final]
    mean = sum(accuracies) / len(accuracies) if accuracies else 0.0
    return gc.Ranked(
        key=record.key,
        group=(record.model, record.train_set, record.reward),
        seed=record.seed,
        accuracy=mean if result.complete else None,
    )


def say_damage(session: Session, missing: Sequence[TrialPlan]) -> None:
    """Name the manifests that are not what was written, and scores of other weights; their stages count as missing."""
    for kind, key in sorted(
        {(stage.kind, stage.key) for item in missing for stage in item.missing(session.store)}
    ):
        try:
            session.store.manifest(kind, key)
        except Damaged as error:
            warn(session, f"damaged: {error}; it is made again")
    for item in missing:
        unscored = item.unscored(session.store)
        old = [s.prepared.split.name for s in unscored if session.store.complete(s.kind, s.key)]
        if old:
            warn(session, f"{item.spec.name}: {of_other_weights(old)}; they are made again")


def _scores(plans: Sequence[TrialPlan]) -> list[tuple[str, str, str]]:
    """Return the scores of trials, as stage, key and file: the report would be the first to read them."""
    return [(stage.kind, stage.key, "scores.parquet") for plan in plans for stage in plan.evaluations]


def _rows_to_read(session: Session, plans: Sequence[TrialPlan]) -> list[tuple[str, str, str]]:
    """Return the rows of data sets that a preparation is about to read, as stage, key and file."""
    missing = (stage for plan in plans for stage in plan.missing(session.store))
    digests = sorted({stage.split.digest for stage in missing if isinstance(stage, PrepareStage)})
    return [("dataset", digest, "pairs.jsonl") for digest in digests]


def _set_aside(session: Session, files: Sequence[tuple[str, str, str]]) -> bool:
    """Make artifacts with a damaged file count as missing, and say so; return whether there was one."""
    found = gc.set_aside(session.store, files)
    for error in found:
        warn(session, f"damaged: {error}; it is made again")
    return bool(found)
