"""The plan of a sweep before anything starts: placements, memory, hours, schedule, price, and pairs that are too long."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.plan import hardware, placement
from orchestrator.plan.durations import Durations, measured_rates, rate_name, slowest, step_parts, utilisation
from orchestrator.plan.hardware import Node
from orchestrator.plan.memory import footprint
from orchestrator.plan.schedule import (
    Job,
    Request,
    RequestId,
    RequestKind,
    lower_bound_s,
    makespan_s,
    ranked,
    simulate,
    window,
)
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.models import architecture_of
from orchestrator.spec.resolve import ResolvedSweep
from orchestrator.spec.stages import (
    PrepareStage,
    PretrainStage,
    ReferenceStage,
    SampleStage,
    Stage,
    TrialPlan,
)
from orchestrator.store.artifacts import Store
from trainers.data import sources
from trainers.data.records import Message, Pair
from trainers.errors import DataError, ModelError, PlanError, SpecError
from trainers.models.architecture import Architecture
from trainers.specs import BUILTIN, DatasetSpec, DrawSpec, ModelSpec, Placement, Rendering

# The lengths of at most this many pairs are counted, the first that are drawn.
MOST = 2000
# Used if the tokenizer is not on this machine; English text under today's vocabularies.
BYTES_PER_TOKEN = 4


@dataclass(slots=True, kw_only=True)
class TrialGroup:
    """The trials of one model, precision and reward type with the same placement and step time. `why` says why they fit nowhere.

    `utilisation` is the share of the peak rate that an estimated step uses, `step_shares` the shares of its parts in its
    time. `peak_gb` is of one rank, `device_hours` of the missing trainings and evaluations. None means unknown.
    """

    model: str
    reward: str
    precision: str
    parameters: int | None
    train_sets: list[str] = field(default_factory=list)
    trials: int = 0
    placement: Placement | None
    effective_batch: int
    peak_gb: float | None
    gpu_gb: float | None
    step_s: float | None
    measured: bool
    utilisation: float | None
    step_shares: dict[str, float]
    device_hours: float | None
    missing: dict[str, int] = field(default_factory=dict)
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A sweep on a cluster. Hours are GPU-hours, or CPU-hours without GPUs; prices are in $, None without GPUs.

    `price` is that of the hours of work, `price_held` that of the whole cluster until the last trial ends. `unknown`
    names models of unknown size, whose hours are in no total.
    """

    sweep: str
    cluster: str
    devices: int
    unit: str
    cells: tuple[TrialGroup, ...]
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


def outlook(
    resolved: ResolvedSweep,
    nodes: Sequence[Node],
    store: Store,
    *,
    price: float | None = None,
    compiles: bool = False,
) -> Outlook:
    """Plan the missing stages of a sweep on the nodes. Only configs of models are fetched."""
    gpus, gpu_gb, _ = placement.gpus_of(nodes)
    devices = gpus or sum(node.cpus for node in nodes)
    policies = [item.spec.answers.policy for item in resolved.plans if item.spec.answers]
    known = architectures([*(item.spec.model for item in resolved.plans), *policies], ask=gpus > 0)
    specs = {item.key: item.spec for item in resolved.plans}
    named = {key: (spec.model.name, spec.reward_name, spec.train_set.name) for key, spec in specs.items()}
    times = Durations(store=store, kind=slowest(nodes), measured=measured_rates(named, store))
    missing = {item.key: item.missing(store) for item in resolved.plans}
    groups: dict[tuple[object, ...], TrialGroup] = {}
    jobs: dict[RequestId, Job] = {}
    for plan in resolved.plans:
        spec, shapes = plan.spec, known[plan.spec.model]
        item = replace(plan, architecture=shapes)
        training = placement.training_of(spec, shapes)
        placed, why = None, ""
        try:
            placed = placement.place(spec, nodes, resolved.sweep.placements, architecture=shapes)
            placed = placement.compiled(placed) if compiles else placed
        except PlanError as error:
            why = str(error)
        peak_gb, rate, used, parts = None, None, None, dict[str, float]()
        if training and placed:
            peak_gb, rate = footprint(training, placed).total, times.rate(item, placed)
            sizes = training, times.lengths(item), placed, times.kind
            used, parts = utilisation(*sizes), step_parts(*sizes)
        new = TrialGroup(
            model=spec.model.name,
            reward=spec.reward_name,
            precision=spec.model.precision,
            parameters=training.architecture.parameters if training else None,
            placement=placed,
            effective_batch=spec.optim.effective_batch,
            peak_gb=peak_gb,
            gpu_gb=gpu_gb or None,
            step_s=rate.step_s if rate else None,
            measured=bool(placed and rate_name(item, placed) in times.measured),
            utilisation=used,
            step_shares={name: part / sum(parts.values()) for name, part in parts.items()},
            device_hours=None if peak_gb is None else 0.0,
            why=why,
        )
        alike = (new.model, new.reward, new.precision, placed, new.effective_batch, why, new.step_s)
        group = groups.setdefault(alike, new)
        group.trials += 1
        if spec.train_set.name not in group.train_sets:
            group.train_sets.append(spec.train_set.name)
        for stage in missing[item.key]:
            group.missing[stage.kind] = group.missing.get(stage.kind, 0) + 1
        if training and placed:
            policy = known[spec.answers.policy] if spec.answers else None
            _add_jobs(jobs, group, item, placed, missing[item.key], times, policy)
    schedule = list(jobs.values())
    hours = sum(job.request.width * job.takes_s for job in schedule) / 3600
    makespan_h = _played_s(schedule, nodes) / 3600
    per_hour, price_is = price_of(nodes, price)
    return Outlook(
        sweep=resolved.sweep.name,
        cluster=hardware.describe(nodes),
        devices=devices,
        unit="GPU" if gpus else "CPU",
        cells=tuple(groups.values()),
        stages=_count_stages(
            resolved.plans, {stage.key for each in missing.values() for stage in each}, store
        ),
        device_hours=hours,
        makespan_h=makespan_h,
        lower_bound_h=lower_bound_s(schedule, nodes) / 3600,
        price_per_hour=per_hour,
        price=None if per_hour is None else per_hour * hours,
        price_held=None if per_hour is None else per_hour * sum(node.gpus for node in nodes) * makespan_h,
        price_is=price_is,
        unknown=tuple(sorted({model.name for model, shapes in known.items() if shapes is None})),
        not_fetched=_not_fetched(resolved.plans),
    )


def architectures(models: Sequence[ModelSpec], *, ask: bool) -> dict[ModelSpec, Architecture | None]:
    """Find the architecture of each model once."""
    return {model: architecture_of(model, ask=ask) for model in dict.fromkeys(models)}


def _count_stages(plans: Sequence[TrialPlan], missing: set[str], store: Store) -> dict[str, dict[str, int]]:
    """Count cached and missing stages by kind; a shared stage counts once."""
    counts: dict[str, dict[str, int]] = {}
    for stage in {stage.key: stage for item in plans for stage in item.stages()}.values():
        of_kind = counts.setdefault(stage.kind, {"cached": 0, "missing": 0})
        if stage.key in missing or store.complete(stage.kind, stage.key):
            of_kind["missing" if stage.key in missing else "cached"] += 1
    return counts


def _not_fetched(plans: Sequence[TrialPlan]) -> tuple[str, ...]:
    """Return the names of the models and data sets that have not been fetched yet."""
    names = {item.train.base.name for item in plans if not item.train.base.fetched}
    stages = (stage for item in plans for stage in item.stages())
    names |= {
        stage.split.name for stage in stages if isinstance(stage, PrepareStage) and not stage.split.fetched
    }
    return tuple(sorted(names))


def _add_jobs(
    jobs: dict[RequestId, Job],
    group: TrialGroup,
    item: TrialPlan,
    placed: Placement,
    missing: Sequence[Stage],
    times: Durations,
    policy: Architecture | None,
) -> None:
    """Add the trial's training and evaluation, and the answers and reference passes that no trial before it has asked for."""

    def add(
        kind: RequestKind, key: str, seconds: float, after: Sequence[RequestId] = (), trial: str = ""
    ) -> None:
        request = Request.of(kind, key, placed, seconds)
        jobs.setdefault(request.id, Job(request=request, takes_s=seconds, after=tuple(after), trial=trial))
        if trial and group.device_hours is not None:
            group.device_hours += request.width * seconds / 3600

    waits, drawn = list[RequestId](), list[RequestId]()
    for stage in missing:
        shared = RequestId(kind="shared", key=stage.key)
        if isinstance(stage, ReferenceStage):
            if shared not in jobs:
                add("shared", stage.key, times.scoring_s(item, [stage.prepared], placed))
            waits.append(shared)
        elif isinstance(stage, SampleStage) and policy:
            if shared not in jobs:
                add("shared", stage.key, times.sample_s(item, stage, policy, placed))
            drawn.append(shared)
    if any(stage.kind == "train" for stage in missing):
        add("train", item.key, times.train_s(item, placed), waits, item.key)
        waits = [RequestId(kind="train", key=item.key)]
    if unscored := [stage.prepared for stage in item.scored if stage in missing]:
        seconds = times.scoring_s(item, unscored, placed)
        add("evaluate", item.key, seconds, [*waits, *drawn], item.key)


def _played_s(jobs: Sequence[Job], nodes: Sequence[Node]) -> float:
    """Return the seconds that the jobs take if the gate starts them as in a run."""
    trainings = [job.request for job in jobs if job.request.kind == "train"]
    turns = {request.id: request for request in ranked(trainings, nodes)}
    jobs = [replace(job, request=turns.get(job.request.id, job.request)) for job in jobs]
    in_turn = {request.key: request.rank for request in turns.values()}
    jobs.sort(key=lambda job: in_turn.get(job.trial, len(in_turn)))
    return makespan_s(simulate(jobs, nodes, window(sum(node.gpus or node.cpus for node in nodes))))


def price_of(nodes: Sequence[Node], given: float | None = None) -> tuple[float | None, str]:
    """Return $ per GPU-hour, the mean over the cluster's GPUs, and its source. Raises SpecError for a price without GPUs."""
    kinds = [(node, kind) for node in nodes if (kind := node.kind) is not None]
    if not kinds and given is not None:
        raise SpecError(f"--price {given:g}: there is no GPU here that has a price; give --cluster, too.")
    if not kinds:
        return None, ""
    if given is not None:
        return given, "--price"
    total = sum(node.gpus * (kind.price if node.price is None else node.price) for node, kind in kinds)
    assumed = any(node.price is None for node, _ in kinds)
    per_hour = total / sum(node.gpus for node, _ in kinds)
    return per_hour, f"assumed: {hardware.PRICES_ASSUMED}" if assumed else "--cluster"


def too_long(plans: Sequence[TrialPlan], store: Store) -> tuple[list[str], list[str]]:
    """Say how many pairs of each set are over the length limits, and why a template refuses one of them.

    Without the tokenizer on this machine they are estimated; sets whose rows were never fetched are left out.
    """
    wanted: dict[
        tuple[str, str, DrawSpec], tuple[DatasetSpec, dict[str, None], dict[Rendering, PrepareStage]]
    ] = {}
    for plan in plans:
        last = [stage.prepared for stage in plan.evaluations[-len(plan.spec.eval_sets) :]]
        sets = zip([plan.train.prepared, *last], [plan.spec.train_set, *plan.spec.eval_sets], strict=False)
        for stage, spec in sets:
            place = (stage.base.tokenizer_key, stage.split.digest, stage.draw)
            _, names, renderings = wanted.setdefault(place, (spec, {}, {}))
            names[stage.base.name] = None
            renderings.setdefault(stage.rendering, stage)
    rows: dict[str, Sequence[Pair]] = {}
    found, refused = [], []
    for (_, digest, draw), (spec, names, renderings) in wanted.items():
        models, left_out = ", ".join(names), ""
        for stage in renderings.values():
            manifest = store.sound_manifest(stage.kind, stage.key)
            split = f"{stage.split.name}/{stage.split.split}"
            if manifest is not None and "too_long" in manifest["info"]:
                over, about, why = int(manifest["info"]["too_long"]), "", ""
                pairs = int(manifest["info"]["pairs"]) + over
            else:
                if digest not in rows:
                    rows[digest] = _rows(stage, spec, store)
                over, pairs, about, why = _counted(stage, rows[digest])
            if why:
                refused.append(f"{models} on {split}, {why}")
            elif over:
                left_out = f"{over} of {pairs} pairs of {split} for {models}{about}"
        if left_out:
            found.append(
                f"over --max-prompt-tokens {draw.max_prompt_tokens} or --max-response-tokens {draw.max_response_tokens}, "
                f"left out: {left_out}"
            )
    return found, refused


def _rows(stage: PrepareStage, spec: DatasetSpec, store: Store) -> Sequence[Pair]:
    kept = pairs_of(store, stage.split.digest)
    if kept or not (spec.source.startswith(BUILTIN) or Path(spec.source).exists()):
        return kept
    return list(sources.iter_pairs(spec, stage.split.split, []))


def _counted(stage: PrepareStage, pairs: Sequence[Pair]) -> tuple[int, int, str, str]:
    """Return how many pairs are too long, how many were counted, which ones or how, and why one is refused, if one is."""
    from trainers.pairs.tokens import Counts, draw_order, iter_tokens

    draw, about = stage.draw, ""
    if len(pairs) > MOST and (draw.max_pairs or len(pairs)) > MOST:
        pairs = [pairs[row] for row in draw_order(len(pairs), draw)[:MOST]]
        draw, about = replace(draw, max_pairs=None), f", of the first {MOST} that are drawn"
    counts, kept = Counts(), 0
    try:
        if (tokenizer := _tokenizer(stage)) is None:
            drawn = [pairs[row] for row in draw_order(len(pairs), draw)[: draw.max_pairs]]
            over = sum(_seems_over(pair, draw) for pair in drawn)
            return over, len(drawn), f", about: taking {BYTES_PER_TOKEN} bytes for a token", ""
        for _ in iter_tokens(pairs, tokenizer, draw, stage.rendering, counts):
            kept += 1
    except (DataError, ModelError) as error:
        if counts.too_long < len(pairs):
            return 0, 0, "", str(error)
    return counts.too_long, counts.too_long + kept, about, ""


def _seems_over(pair: Pair, draw: DrawSpec) -> bool:
    """Return whether a text is over its limit by its bytes."""

    def tokens(*messages: Message) -> float:
        return sum(len((item.content + item.fields).encode()) for item in messages) / BYTES_PER_TOKEN

    prompt = tokens(*pair.prompt) + len(pair.tools.encode()) / BYTES_PER_TOKEN
    longest = max(tokens(*turns) for turns in pair.responses)
    return prompt > draw.max_prompt_tokens or longest > draw.max_response_tokens


def _tokenizer(stage: PrepareStage) -> Any:
    """Return the tokenizer; None if it is not on this machine."""
    from trainers.models import tiny
    from trainers.pairs.templates import choose_template, load_tokenizer

    base = stage.base
    if isinstance(base.origin, PretrainStage):
        return choose_template(tiny.build_tokenizer(), base.template)
    if base.origin is None and Path(base.location).is_dir():
        return load_tokenizer(base.location, base.revision, base.trust, base.template)
    return None
