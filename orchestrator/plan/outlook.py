"""What a sweep comes to on a cluster, before anything starts: placements, memory, hours, a schedule and a price."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.plan import estimate, hardware, placement
from orchestrator.plan.capacity import Node
from orchestrator.plan.durations import Durations, measured_rates, rate_name, slowest
from orchestrator.plan.estimate import Job
from orchestrator.plan.hardware import NodeGroup
from orchestrator.plan.placement import Need, need_of, place, predicted
from orchestrator.spec.architectures import architecture_of
from orchestrator.spec.resolve import ResolvedSweep
from orchestrator.spec.stages import ReferenceStage, Stage
from orchestrator.spec.trial_plan import TrialPlan
from orchestrator.spec.trials import PlacementRule, TrialSpec
from orchestrator.store.artifacts import Store
from trainers.architecture import Architecture
from trainers.errors import PlanError
from trainers.specs import ModelSpec, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The trials of one model and reward type that are laid out alike. `why` says that they fit nowhere, and why.

    `peak_gb` is of one rank, `device_hours` of what is missing: trainings and evaluations. None is not known.
    """

    model: str
    reward: str
    parameters: int | None
    trials: int
    placement: Placement | None
    effective_batch: int
    peak_gb: float | None
    gpu_gb: float | None
    step_s: float | None
    measured: bool
    device_hours: float | None
    missing: dict[str, int]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A sweep on a cluster. Hours are of GPUs where there are any, else of CPUs; prices in $, None without GPUs.

    `price` is of the hours of work, `price_held` that of the whole cluster until the last trial has ended. `unknown`
    names models of unknown size, whose hours are in no total.
    """

    sweep: str
    cluster: str
    devices: int
    unit: str
    cells: tuple[Cell, ...]
    stages: dict[str, dict[str, int]]
    device_hours: float
    makespan_h: float
    lower_bound_h: float
    price_per_hour: float | None
    price: float | None
    price_held: float | None
    price_is: str
    unknown: tuple[str, ...] = ()
    not_fetched: tuple[str, ...] = ()


@dataclass(slots=True)
class _Sums:
    """One cell while its trials are gone through."""

    spec: TrialSpec
    placement: Placement | None
    why: str
    need: Need | None
    trials: int = 0
    seconds: float = 0.0
    step_s: float | None = None
    measured: bool = False
    missing: dict[str, int] = field(default_factory=dict)


def outlook(
    resolved: ResolvedSweep,
    groups: Sequence[NodeGroup],
    store: Store,
    *,
    price: float | None = None,
) -> Outlook:
    """What is missing of the sweep, laid out on those nodes. Nothing is fetched but a model's config."""
    nodes = hardware.nodes_of(groups)
    gpus, gpu_gb = placement.gpus_of(nodes)
    devices = gpus or sum(node.cpus for node in nodes)
    known = architectures([item.spec.model for item in resolved.plans], ask=gpus > 0)
    named = {item.key: (item.spec.model.name, item.spec.reward_name) for item in resolved.plans}
    times = Durations(store=store, kind=slowest(groups), measured=measured_rates(named, store))
    cells: dict[tuple[object, ...], _Sums] = {}
    jobs: dict[str, Job] = {}
    for item in resolved.plans:
        sums = _cell_of(cells, item.spec, nodes, resolved.sweep.placements, known)
        sums.trials += 1
        missing = item.missing(store)
        for stage in missing:
            sums.missing[stage.kind] = sums.missing.get(stage.kind, 0) + 1
        if sums.need is not None and sums.placement is not None:
            _add_jobs(jobs, sums, item, missing, times)
    schedule = list(jobs.values())
    hours = sum(job.width * job.seconds for job in schedule) / 3600
    makespan = estimate.makespan_s(schedule, devices) / 3600
    per_hour, price_is = _price(groups, price)
    return Outlook(
        sweep=resolved.sweep.name,
        cluster=hardware.describe(groups),
        devices=devices,
        unit="GPU" if gpus else "CPU",
        cells=tuple(_cell(sums, gpu_gb or None) for sums in cells.values()),
        stages=count_stages(resolved.plans, store),
        device_hours=hours,
        makespan_h=makespan,
        lower_bound_h=estimate.lower_bound_s(schedule, devices) / 3600,
        price_per_hour=per_hour,
        price=None if per_hour is None else per_hour * hours,
        price_held=None if per_hour is None else per_hour * devices * makespan,
        price_is=price_is,
        unknown=tuple(sorted({sums.spec.model.name for sums in cells.values() if sums.need is None})),
        not_fetched=not_fetched(resolved.plans),
    )


def architectures(models: Sequence[ModelSpec], *, ask: bool) -> dict[ModelSpec, Architecture | None]:
    """The architecture of each model, each looked for once."""
    return {model: architecture_of(model, ask=ask) for model in dict.fromkeys(models)}


def count_stages(plans: Sequence[TrialPlan], store: Store) -> dict[str, dict[str, int]]:
    """Cached and missing stages by kind; one that several trials share counts once."""
    counts: dict[str, dict[str, int]] = {}
    needed = {stage.key for item in plans for stage in item.missing(store)}
    for stage in {stage.key: stage for item in plans for stage in item.stages()}.values():
        of_kind = counts.setdefault(stage.kind, {"cached": 0, "missing": 0})
        done = store.complete(stage.kind, stage.key) and stage.key not in needed
        if done or stage.key in needed:
            of_kind["cached" if done else "missing"] += 1
    return counts


def not_fetched(plans: Sequence[TrialPlan]) -> tuple[str, ...]:
    """Names of the models and data sets of which nothing is known yet but where they are."""
    names = {item.train.base.name for item in plans if not item.train.base.fetched}
    for item in plans:
        prepared = [item.train.prepared, *(stage.prepared for stage in item.evaluations)]
        names |= {stage.split.name for stage in prepared if not stage.split.fetched}
    return tuple(sorted(names))


def _add_jobs(
    jobs: dict[str, Job], sums: _Sums, item: TrialPlan, missing: Sequence[Stage], times: Durations
) -> None:
    """The trial's training and evaluation, and the reference passes that nobody has asked for before."""
    need, placed = sums.need, sums.placement
    assert need is not None
    assert placed is not None
    references = [stage for stage in missing if isinstance(stage, ReferenceStage)]
    for stage in references:
        seconds = times.scoring_s(need.training, [stage.prepared], placed)
        jobs.setdefault(stage.key, Job(id=stage.key, width=1, seconds=seconds))
    # Asked for even where nothing is missing: the row tells how fast it goes.
    train_s = times.train_s(item, need.training, placed)
    sums.step_s = times.rate(item, need.training, placed).step_s
    sums.measured |= rate_name(item, placed) in times.measured
    waits = tuple(stage.key for stage in references)
    if any(stage.kind == "train" for stage in missing):
        jobs[item.key] = Job(id=item.key, width=placed.world_size, seconds=train_s, after=waits)
        sums.seconds += placed.world_size * train_s
        waits = (*waits, item.key)
    evaluations = [stage for stage in item.evaluations if stage in missing]
    if evaluations:
        seconds = times.evaluate_s(need.training, evaluations, placed)
        name = f"evaluate {item.key}"
        jobs[name] = Job(id=name, width=1, seconds=seconds, after=waits)
        sums.seconds += seconds


def _cell_of(
    cells: dict[tuple[object, ...], _Sums],
    spec: TrialSpec,
    nodes: Sequence[Node],
    rules: Sequence[PlacementRule],
    known: Mapping[ModelSpec, Architecture | None],
) -> _Sums:
    shapes = known[spec.model]
    placed, why = None, ""
    try:
        placed = place(spec, nodes, rules, architecture=shapes)
    except PlanError as error:
        why = str(error)
    name = (spec.model.name, spec.reward.name, placed, spec.optim.effective_batch, why)
    if name not in cells:
        need = need_of(spec, shapes)
        cells[name] = _Sums(spec=spec, placement=placed, why=why, need=need)
    return cells[name]


def _cell(sums: _Sums, gpu_gb: float | None) -> Cell:
    peak = None
    if sums.need is not None and sums.placement is not None:
        peak = predicted(sums.need, sums.placement).total
    return Cell(
        model=sums.spec.model.name,
        reward=sums.spec.reward.name,
        parameters=sums.need.training.architecture.parameters if sums.need else None,
        trials=sums.trials,
        placement=sums.placement,
        effective_batch=sums.spec.optim.effective_batch,
        peak_gb=peak,
        gpu_gb=gpu_gb,
        step_s=sums.step_s,
        measured=sums.measured,
        device_hours=sums.seconds / 3600 if peak is not None else None,
        missing=sums.missing,
        why=sums.why,
    )


def _price(groups: Sequence[NodeGroup], given: float | None) -> tuple[float | None, str]:
    """$ per GPU-hour, the mean over the cluster's GPUs, and where it is from."""
    with_gpus = [group for group in groups if group.kind is not None and group.gpus]
    if not with_gpus:
        return None, ""
    if given is not None:
        return given, "--price"
    gpus = sum(group.count * group.gpus for group in with_gpus)
    total = sum(
        group.count * group.gpus * (group.kind.price if group.price is None else group.price)
        for group in with_gpus
        if group.kind is not None
    )
    assumed = any(group.price is None for group in with_gpus)
    return total / gpus, f"assumed: {hardware.PRICES_ASSUMED}" if assumed else "--cluster"
