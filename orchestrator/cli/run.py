"""The commands that need a sweep's trials: run, retry and plan."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from rich.table import Table

from orchestrator.cli.analyses import run_follow_up, show_analyses, with_analyses
from orchestrator.cli.design import Growth, design_lines, grows, rounded
from orchestrator.cli.inspect import gigabytes, print_report, say_damaged_logs, say_holes
from orchestrator.cli.options import Plan, Run
from orchestrator.cli.running import catch_up, run_missing, show_report
from orchestrator.cli.session import DEFECT, Session, dump_json, profile_for, require_price, select
from orchestrator.cli.terminal import fits, fitting, late_bar, quiet, say
from orchestrator.plan import placement
from orchestrator.plan.hardware import Node, local_capacity, read_cluster
from orchestrator.plan.outlook import Outlook, TrialGroup, architectures, outlook, too_long
from orchestrator.report.audit import audit_sweep
from orchestrator.report.page import write_full_report
from orchestrator.report.results import (
    SCORES,
    TrialResult,
    TrialState,
    by_seeds,
    of_other_weights,
    trial_states,
    with_scores,
)
from orchestrator.report.summary import Written
from orchestrator.run.failures import is_final
from orchestrator.run.hub_models import fetch_models
from orchestrator.run.ray.scaling import all_workers, still_absent
from orchestrator.run.workers import cluster_address, set_ray_environment
from orchestrator.spec.declaration import adopt, declare
from orchestrator.spec.models import denial, denied_models
from orchestrator.spec.redaction import redacted
from orchestrator.spec.resolve import ResolvedSweep, missing_trials, resolve
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import PrepareStage, TrialPlan
from orchestrator.spec.trials import Sweep
from orchestrator.store import gc
from orchestrator.store.artifacts import WEIGHTS, Store
from orchestrator.store.records import Declaration, TrialNote, declared_sweeps, read_state
from trainers.errors import Damaged, ModelError, PlanError, SpecError, StorageError, SweepError
from trainers.specs import Placement

Build = Callable[[Selection], Sweep]
# A narrow terminal does not show this column of a plan; --json has it.
SPARE = "tokens a forward"
WRAPPED = ("model · reward", "trained on", "memory saved by", "to do")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A sweep that can start: `todo` are those of its `missing` trials that the command runs, as `placements` say."""

    resolved: ResolvedSweep
    placements: Mapping[str, Placement]
    declaration: Declaration
    missing: Sequence[TrialPlan]
    todo: Sequence[TrialPlan]


def ready(session: Session, sweep: Sweep, *, again: bool = False) -> Ready:
    """Declare the sweep and find its missing trials, or with `again` the failed ones among its declared trials.

    A grid that --only or --max-trials narrows removes nothing from the declaration. Raises SweepError.
    """
    options, store = session.options, session.store
    resolved, placements = _prepared(session, sweep)
    if again:
        declaration = session.declaration()
    else:
        wanted = with_analyses(declare(resolved), session, resolved.plans)
        adds = options.extend or _narrowed(session)
        declaration = adopt(wanted, store, adds=adds, replaces=options.replace, grows=grows(session))
        say_damaged_logs(session, [item.key for item in resolved.plans])
    missing = missing_trials(resolved.plans, store)
    notes = read_state(session.sweep_name, store).trials
    causes = {item.key: cause for item in missing if (cause := notes.get(item.key, TrialNote()).cause)}
    if again:
        declared = {trial.key for trial in declaration.trials}
        todo = [item for item in missing if item.key in declared and item.key in causes]
        names = ", ".join(item.spec.name for item in todo)
        session.say(f"running again: {names}" if todo else "no trial of these has failed")
        here = {item.key for item in resolved.plans}
        failed = {key for key, note in notes.items() if note.cause} - here
        others = [trial.name for trial in declaration.trials if trial.key in failed]
        if others and not _narrowed(session):
            session.say(
                f"failed, but not in this grid: {', '.join(others)}; give `retry` the flags of their run"
            )
    else:
        todo = [item for item in missing if not is_final(causes.get(item.key, ""))]
        session.say(_headline(len(resolved.plans), len(resolved.plans) - len(missing), todo, session))
        session.warn(*resolved.left_out)
        if final := len(missing) - len(todo):
            session.say(f"{final} trials failed for good before and are left out; `retry` runs them again")
        say_damage(session, missing)
        if todo:
            session.warn(*audit_errors(declaration, store))
    return Ready(
        resolved=resolved, placements=placements, declaration=declaration, missing=missing, todo=todo
    )


def _prepared(session: Session, sweep: Sweep) -> tuple[ResolvedSweep, dict[str, Placement]]:
    """Return the sweep with its stages, and the placements of its trials by key. Raises SweepError.

    Damaged scores are set aside, so they count as missing. If nothing is missing, no cluster is joined and nothing is placed.
    """
    if may_join(session) and session.sweep_name in declared_sweeps(session.store):
        # An error is raised again below.
        with contextlib.suppress(SweepError):
            resolved = _resolve(session, sweep, fetch=False)
            _set_aside_scores(session, resolved.plans)
            if not missing_trials(resolved.plans, session.store):
                return resolved, {}
    nodes = capacity(session)
    placement.require_fit(sweep.trials, nodes)
    if denied := denied_models([trial.model for trial in sweep.trials]):
        raise ModelError(denial(denied))
    resolved = _resolve(session, sweep, fetch=True)
    _set_aside_scores(session, resolved.plans)
    missing = (stage for plan in resolved.plans for stage in plan.missing(session.store))
    splits = {stage.split for stage in missing if isinstance(stage, PrepareStage)}
    read = sorted((split.kind, split.digest, "pairs.jsonl") for split in splits)
    if damaged := gc.set_aside(session.store, read):
        session.warn(*(f"damaged: {error}; it is made again" for error in damaged))
        resolved = _resolve(session, sweep, fetch=True)
    known = architectures([trial.model for trial in sweep.trials], ask=any(node.gpus for node in nodes))
    plans = [dataclasses.replace(item, architecture=known[item.spec.model]) for item in resolved.plans]
    # A trial that fits nowhere is refused before anything starts.
    placements = {
        item.key: placement.place(item.spec, nodes, sweep.placements, architecture=item.architecture)
        for item in plans
    }
    return dataclasses.replace(resolved, plans=tuple(plans)), placements


def may_join(session: Session) -> bool:
    """Whether the command runs on Ray and a cluster is up that it would join."""
    return session.options.backend == "ray" and cluster_address() is not None


def capacity(session: Session) -> tuple[Node, ...]:
    """Return the nodes for the command. Raises PlanError, StorageError.

    These are the nodes of --cluster, else those of the running cluster, which is joined, and those it may still add, else
    this machine.
    """
    options = session.options
    given = () if options.cluster is None else read_cluster(options.cluster)
    if given and isinstance(options.command, Plan):
        return given
    if given and not may_join(session):
        raise PlanError(
            f"--cluster {options.cluster}: there is no Ray cluster to run on. Start it (`ray up`), or run on its head or "
            "with RAY_ADDRESS; `plan --cluster …` needs none."
        )
    if not may_join(session):
        return local_capacity()
    workers = all_workers(options.cluster)
    set_ray_environment()
    from orchestrator.run.ray import cluster

    with quiet(session.driver_log, session.console.width) as terminal:
        if not cluster.join_ray(functools.partial(say, terminal)):
            return local_capacity()
        nodes = cluster.capacity()
        if not isinstance(options.command, Plan):
            cluster.require_shared_storage(session.store, nodes)
    return (*nodes, *still_absent(workers, nodes).values())


def carry_out(session: Session, work: Ready) -> Written:
    """Run the trials, and bring the report and MLflow up to date."""
    if work.todo:
        fetch_models_here(session, work.todo)
        placements = work.placements
        if session.options.compile:
            placements = {key: placement.compiled(placed) for key, placed in placements.items()}
        done = len(work.resolved.plans) - len(work.missing)
        return run_missing(session, work.declaration, work.todo, placements, done)
    gc.clear_up(session.store, session.sweep_name)
    written = write_full_report(work.declaration, session.store, functools.partial(late_bar, session.console))
    catch_up(session, work.declaration, written)
    return written


def rounds(session: Session, build: Build, *, again: bool = False) -> Iterator[Sweep]:
    """Yield the grid's sweep or, with --until or --budget, those to which it grows; with `again` only the first. Raises SweepError."""
    if again:
        # An unknown sweep is refused before anything is fetched.
        session.declaration()
    sweep = _sweep(session, build)
    grown = _growth(session, sweep, fetch=True).rounds(session.say) if grows(session) else iter([sweep])
    yield from itertools.islice(grown, 1 if again else None)


def _growth(session: Session, sweep: Sweep, *, fetch: bool) -> Growth:
    command = session.options.command
    price = command.price if isinstance(command, Plan) else None
    require_price(price)
    return Growth(
        base=sweep,
        store=session.store,
        nodes=capacity(session),
        resolve=lambda sweep: _resolve(session, sweep, fetch=fetch),
        until=session.options.until,
        budget=session.options.budget,
        price=price,
    )


def run(session: Session, build: Build, *, again: bool = False) -> int:
    """Run missing trials, or with `again` failed ones; then write the report, run analyses, and evict weights."""
    grids = rounds(session, build, again=again)
    work = ready(session, next(grids), again=again)
    # Failures of these trials are printed when they happen.
    told = [item.key for item in work.todo]
    try:
        written = carry_out(session, work)
        for grid in grids:
            work = ready(session, grid)
            told += [item.key for item in work.todo]
            written = carry_out(session, work)
        print_report(session, written)
        computed = run_follow_up(session, work.declaration, work.resolved.plans)
        show_analyses(session, work.declaration)
        if computed:
            show_report(session, work.declaration, written, complete=written.complete)
        evict_weights(session, asked(session, work, written.results))
    except SweepError as error:
        # The user's mistakes were refused before, so this is a defect or the storage.
        session.say(f"error: {redacted(str(error))}", style="red")
        if not isinstance(error, StorageError):
            return DEFECT
        # Even without room for a report, the missing trials are printed.
        results = asked(session, work, trial_states(work.declaration.trials, session.store))
        return say_holes(session, results, told=told) or DEFECT
    return say_holes(session, asked(session, work, written.results), told=told)


def fetch_models_here(session: Session, todo: Sequence[TrialPlan]) -> None:
    """Download the models that trials need, unless they run on a cluster: its nodes download for themselves."""
    if not may_join(session):
        fetch_models(todo, session.store, lambda text, style: session.say(text, style=style))


def _narrowed(session: Session) -> bool:
    return bool(session.options.only or session.options.max_trials)


def asked(session: Session, work: Ready, results: Sequence[TrialState]) -> list[TrialState]:
    """Return the results of the command's trials: a narrowed run leaves out the others."""
    if not (isinstance(session.options.command, Run) and _narrowed(session)):
        return list(results)
    mine = {item.key for item in work.resolved.plans}
    return [item for item in results if item.record.key in mine]


def plan_only(session: Session, build: Build) -> Outlook:
    """Print and return what is missing, where it would run, for how long and at what price."""
    sweep = _sweep(session, build)
    growth = _growth(session, sweep, fetch=False)
    resolved, compiles = growth.grid, session.options.compile
    found = outlook(resolved, growth.nodes, session.store, price=growth.price, compiles=compiles)
    told = growth.outlook()
    forecast = [growth.forecast()] if grows(session) else []
    left_out, refused = too_long(resolved.plans, session.store)
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
        said = {"categories": _categories(resolved), "too_long": left_out, "refused": refused, "design": told}
        said |= {"rule": forecast, "access_denied": denied, "trials": trials}
        dump_json(dataclasses.asdict(found) | said)
        return found
    session.warn(*resolved.left_out)
    _print_outlook(session, found, len(resolved.plans))
    for train_set, evaluated in _categories(resolved).items():
        by_category = (f"{', '.join(names)} ({category})" for category, names in evaluated.items())
        session.say(f"trained on {train_set}, evaluated on {', '.join(by_category)}")
    session.say(*design_lines(told), *forecast)
    if not any(group.missing for group in found.cells):
        session.say(f"nothing to do: all {len(resolved.plans)} trials are complete")
    session.warn(*left_out, *(f"would be refused: {why}" for why in refused))
    if again := _trains_again(resolved.plans, session):
        session.say(again)
    if denied:
        session.warn(denial(denied))
    return found


def _categories(resolved: ResolvedSweep) -> dict[str, dict[str, list[str]]]:
    """Return for each training set its evaluation sets by category, in the order of the trials."""
    found: dict[str, dict[str, list[str]]] = {}
    pairs = [(plan.spec.train_set.name, item.name) for plan in resolved.plans for item in plan.spec.eval_sets]
    for train_set, evaluated in dict.fromkeys(pairs):
        category = resolved.categories[train_set, evaluated]
        found.setdefault(train_set, {}).setdefault(category, []).append(evaluated)
    return found


def _print_outlook(session: Session, found: Outlook, trials: int) -> None:
    """Print a row for each model and reward type, then the values that all rows share, then the totals."""
    rows = [_outlook_row(group, found.unit) for group in found.cells]
    told = [name for name in rows[0] if any(row[name] not in ("", "–") for row in rows)] if rows else []
    shared = [name for name in told[1:] if len(rows) > 1 and len({row[name] for row in rows}) == 1]
    columns = [name for name in told if name not in shared]
    session.say(f"{found.sweep}: {trials} trials on {found.cluster}")
    table = _outlook_table(columns, rows, session.console.width)
    if SPARE in columns and not fits(table, session.console):
        columns.remove(SPARE)
        table = _outlook_table(columns, rows, session.console.width)
    session.console.print(fitting(table, session.console))
    alike = [f"all alike: {'; '.join(f'{name} {rows[0][name]}' for name in shared)}"] if shared else []
    session.say(*alike, *_totals(found))
    session.warn(*(f"does not fit: {group.why}" for group in found.cells if group.why))


def _outlook_table(columns: Sequence[str], rows: Sequence[dict[str, str]], width: int) -> Table:
    """Return the table with columns that break no word; the first columns take the space that is left of `width`."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    least: dict[str, int] = {}
    for name in columns:
        cells = [row[name] for row in rows]
        # Words are wrapped, numbers are not.
        least[name] = max(map(len, name.split() + (" ".join(cells).split() if name in WRAPPED else cells)))
    room = width - sum(least.values()) - len(columns) + 1
    for name in columns:
        most = max(len(name), *(len(row[name]) for row in rows))
        more = max(0, min(room, most - least[name]))
        room -= more
        table.add_column(name, justify="left" if name in WRAPPED else "right", width=least[name] + more)
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _outlook_row(group: TrialGroup, unit: str) -> dict[str, str]:
    """Return one row of the table by column. A `~` marks an estimated time, a `?` an unknown value."""
    placed = group.placement
    # Only its own stages; the line below the table counts the shared ones.
    own = [f"{group.missing[kind]} {kind}" for kind in ("train", "evaluate") if group.missing.get(kind)]
    row = {
        "model · reward": f"{group.model} · {group.reward}",
        "trained on": ", ".join(group.train_sets),
        "trials": str(group.trials),
        "weights": _count(group.parameters),
        "precision": group.precision,
        "devices": "none",
        "batch": str(group.effective_batch),
        SPARE: "",
        "memory saved by": "does not fit",
        "peak GB": "",
        "GPU GB": "",
        "step s": "",
        f"{unit} hours": "",
        "to do": ", ".join(own) or ("shared stages" if group.missing else "nothing"),
    }
    if placed is not None:
        saved = [("recomputation", placed.checkpointing), ("offload", placed.offload_optimizer)]
        peak = "?" if group.peak_gb is None else f"{group.peak_gb:.{1 if group.peak_gb >= 1 else 2}f}"
        row |= {
            "devices": f"{placed.world_size}, ZeRO {placed.zero_stage}",
            SPARE: f"{placed.forward_tokens:,}",
            "memory saved by": ", ".join(word for word, is_used in saved if is_used) or "–",
            "peak GB": peak,
            "GPU GB": f"{group.gpu_gb:g}" if group.gpu_gb else "",
            "step s": "?"
            if group.step_s is None
            else f"{rounded(group.step_s)}{'' if group.measured else ' ~'}",
            f"{unit} hours": "?" if group.device_hours is None else rounded(group.device_hours),
        }
    return row


def _totals(found: Outlook) -> list[str]:
    counts = ", ".join(
        f"{kind} {count['missing']} to do, {count['cached']} cached" for kind, count in found.stages.items()
    )
    at = f"{found.devices} {found.unit}{'s' if found.devices > 1 else ''}"
    lines = [
        f"stages, shared ones once: {counts}",
        f"{rounded(found.device_hours)} {found.unit}-hours on {at}: about {rounded(found.makespan_h)} h from start to end, "
        f"never under {rounded(found.lower_bound_h)} h; steps with ~ are estimated, the others measured",
    ]
    if found.price is not None and found.price_held is not None:
        lines.append(
            f"price: ${found.price:,.2f} for the work, ${found.price_held:,.2f} with the whole cluster held to the end, at "
            f"${found.price_per_hour:,.2f} per GPU-hour ({found.price_is})"
        )
    estimated = [
        (group.device_hours, group.utilisation, group.step_shares)
        for group in found.cells
        if group.device_hours and group.utilisation is not None and not group.measured
    ]
    if total := sum(hours for hours, _, _ in estimated):
        used = sum(hours * share for hours, share, _ in estimated) / total
        parts = {
            name: sum(hours * shares[name] for hours, _, shares in estimated) / total
            for name in estimated[0][2]
        }
        said = ", ".join(f"{name} {share:.0%}" for name, share in parts.items() if share >= 0.005)
        lines.append(f"estimated steps use {used:.0%} of the peak rate (MFU); their time: {said}")
    if found.unknown:
        lines.append(f"of unknown size, so on one GPU and in no total: {', '.join(found.unknown)}")
    if found.not_fetched:
        lines.append(f"not fetched: {', '.join(found.not_fetched)}")
    return lines


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "?"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {letter}"
    return str(parameters)


def _sweep(session: Session, build: Build) -> Sweep:
    """Return the sweep that the flags select; only --profile auto looks at the cluster. Raises SpecError."""
    if session.options.extend and session.options.replace:
        raise SpecError(
            "--extend adds the grid to the sweep, --replace puts it in its place; give one of them."
        )
    nodes = capacity(session) if session.options.profile == "auto" else ()
    profile, why = profile_for(session.options, nodes, session.profiles)
    if why and not session.options.json and not (session.options.models and session.options.train_sets):
        session.say(why)
    return build(select(session.options, profile, session.sweep_name))


def _resolve(session: Session, sweep: Sweep, *, fetch: bool) -> ResolvedSweep:
    return resolve(sweep, session.store, fetch=fetch, lock=session.folder / "revisions.lock.json")


def _headline(trials: int, complete: int, todo: Sequence[TrialPlan], session: Session) -> str:
    if not todo:
        count = f"all {trials}" if complete == trials else f"{complete} of {trials}"
        return f"{count} trials are complete in {session.store.root}; nothing to run"
    stages = {(stage.kind, stage.key) for item in todo for stage in item.missing(session.store)}
    kinds = [kind for kind, _ in sorted(stages)]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    done = f"{trials} trials, {complete} complete; to run: {counted}"
    return "; ".join(filter(None, (done, _trains_again(todo, session))))


def _trains_again(plans: Sequence[TrialPlan], session: Session) -> str:
    """Say how many trainings run a second time, and how long they took; "" if none does."""
    took_s = [took for item in plans if (took := item.trains_again_s(session.store)) is not None]
    if not took_s:
        return ""
    return f"{len(took_s)} train again, as their weights were evicted; they took {sum(took_s):,.0f} s"


def evict_weights(session: Session, results: Sequence[TrialState]) -> None:
    keep = session.options.keep_weights
    if keep != "all":
        gone = evictable(with_scores(results, session.store), keep)
        if freed := gc.evict_weights(session.store, session.sweep_name, gone):
            # MLflow still names the place of these weights.
            from orchestrator.tracking.mlflow import forget_shown

            forget_shown(session.store, session.sweep_name)
            session.say(
                f"{gigabytes(freed)} GB of weights evicted (--keep-weights {keep}); scores and logs stay"
            )


def evictable(results: Sequence[TrialResult], keep: Literal["best", "none"]) -> list[str]:
    """Return the keys of complete trainings whose weights can go; with `best`, all but the most accurate of each group.

    A group is judged once all of its trials are complete; the lowest seed breaks ties.
    """

    def rank(item: TrialResult) -> tuple[float, int]:
        return fmean([found.metrics["accuracy"] for found in item.final] or [0.0]), -item.record.seed

    gone: list[str] = []
    for alike in by_seeds(results) if keep == "best" else [[item] for item in results]:
        if all(item.complete for item in alike):
            best = max(alike, key=rank) if keep == "best" else None
            gone += [item.record.key for item in alike if item is not best]
    return gone


def audit_errors(declaration: Declaration, store: Store) -> list[str]:
    """Return the errors that the audit finds in the data, before any training."""
    return [item.said for item in audit_sweep(declaration, store).findings if item.severity == "error"]


def say_damage(session: Session, missing: Sequence[TrialPlan]) -> None:
    """Name damaged manifests and scores of earlier weights, whose stages count as missing."""
    found = {(stage.kind, stage.key) for item in missing for stage in item.missing(session.store)}
    for kind, key in sorted(found | {(WEIGHTS, key) for kind, key in found if kind == "train"}):
        try:
            session.store.manifest(kind, key)
        except Damaged as error:
            session.warn(f"damaged: {error}; it is made again")
    for item in missing:
        unscored = item.unscored(session.store)
        old = [s.prepared.split.name for s in unscored if session.store.complete(s.kind, s.key)]
        if old:
            session.warn(f"{item.spec.name}: {of_other_weights(old)}; they are made again")


def _set_aside_scores(session: Session, plans: Sequence[TrialPlan]) -> None:
    """Set damaged scores aside, so that they count as missing before the report reads them."""
    scores = [(stage.kind, stage.key, SCORES) for plan in plans for stage in plan.scored]
    session.warn(*(f"damaged: {error}; it is made again" for error in gc.set_aside(session.store, scores)))
