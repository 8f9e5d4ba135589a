"""The plan of a sweep before anything starts: placements, memory, hours, schedule, price, and pairs that are too long."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from orchestrator.plan import hardware, placement
from orchestrator.plan.durations import Durations, measured_rates, rate_name, slowest, step_parts, utilisation
from orchestrator.plan.hardware import Node
from orchestrator.plan.memory import footprint
from orchestrator.plan.schedule import (
    Job,
    Request,
    RequestId,
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
from trainers.errors import DataError, ModelError, PlanError
from trainers.models.architecture import Architecture
from trainers.specs import BUILTIN, DatasetSpec, DrawSpec, ModelSpec, Placement, Rendering

# The lengths of at most this many pairs are counted, the first that are drawn.
MOST = 2000
# Used if the tokenizer is not on this machine; English text under today's vocabularies.
BYTES_PER_TOKEN = 4
# More tokens than any text has.
ANY = 1 << 62
# No tokenizer makes more tokens than bytes, and no template adds more to a message.
TEMPLATE_TOKENS = 128


@dataclass(slots=True, kw_only=True)
class TrialGroup:
    """The trials of one model, precision and reward type with the same placement. `why` says why they fit nowhere.

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
    step_s: float | None = None
    measured: bool = False
    utilisation: float | None = None
    step_shares: dict[str, float] = field(default_factory=dict)
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
    named = {item.key: (item.spec.model.name, item.spec.reward_name) for item in resolved.plans}
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
        peak_gb = footprint(training, placed).total if training and placed else None
        new = TrialGroup(
            model=spec.model.name,
            reward=spec.reward_name,
            precision=spec.model.precision,
            parameters=training.architecture.parameters if training else None,
            placement=placed,
            effective_batch=spec.optim.effective_batch,
            peak_gb=peak_gb,
            gpu_gb=gpu_gb or None,
            device_hours=None if peak_gb is None else 0.0,
            why=why,
        )
        alike = (new.model, new.reward, new.precision, placed, new.effective_batch, why)
        group = groups.setdefault(alike, new)
        group.trials += 1
        if spec.train_set.name not in group.train_sets:
            group.train_sets.append(spec.train_set.name)
        for stage in missing[item.key]:
            group.missing[stage.kind] = group.missing.get(stage.kind, 0) + 1
        if training and placed:
            sizes = training, times.lengths(item), placed, times.kind
            parts = step_parts(*sizes)
            group.step_shares = {name: part / sum(parts.values()) for name, part in parts.items()}
            group.utilisation = utilisation(*sizes)
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
        price_held=None if per_hour is None else per_hour * devices * makespan_h,
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

    def add(request: Request, after: Sequence[RequestId] = (), trial: str = "") -> None:
        job = Job(request=request, takes_s=request.expected_s, after=tuple(after), trial=trial)
        jobs.setdefault(request.id, job)
        if trial and group.device_hours is not None:
            group.device_hours += request.width * request.expected_s / 3600

    waits, drawn = list[RequestId](), list[RequestId]()
    for stage in missing:
        shared = RequestId(kind="shared", key=stage.key)
        if isinstance(stage, ReferenceStage):
            if shared not in jobs:
                seconds = times.scoring_s(item, [stage.prepared], placed)
                add(Request.of("shared", stage.key, placed, seconds))
            waits.append(shared)
        elif isinstance(stage, SampleStage) and policy:
            if shared not in jobs:
                # It reads the rows of the prompts.
                seconds = times.sample_s(item, stage, policy, placed)
                add(Request.of("shared", stage.key, placed, seconds))
            drawn.append(shared)
    # The speed of a training is shown even if none is missing.
    rate = times.rate(item, placed)
    group.step_s = rate.step_s if rate else None
    group.measured |= rate_name(item, placed) in times.measured
    if any(stage.kind == "train" for stage in missing):
        seconds = times.train_s(item, placed)
        add(request := Request.of("train", item.key, placed, seconds), waits, item.key)
        waits.append(request.id)
    if unscored := [stage.prepared for stage in item.scored if stage in missing]:
        seconds = times.scoring_s(item, unscored, placed)
        add(Request.of("evaluate", item.key, placed, seconds), [*waits, *drawn], item.key)


def _played_s(jobs: Sequence[Job], nodes: Sequence[Node]) -> float:
    """Return the seconds that the jobs take if the gate starts them as in a run."""
    trainings = [job.request for job in jobs if job.request.kind == "train"]
    turns = {request.id: request for request in ranked(trainings, nodes)}
    jobs = [replace(job, request=turns.get(job.request.id, job.request)) for job in jobs]
    in_turn = {request.key: request.rank for request in turns.values()}
    jobs.sort(key=lambda job: in_turn.get(job.trial, len(in_turn)))
    return makespan_s(simulate(jobs, nodes, window(sum(node.gpus or node.cpus for node in nodes))))


def price_of(nodes: Sequence[Node], given: float | None = None) -> tuple[float | None, str]:
    """Return $ per GPU-hour, the mean over the cluster's GPUs, and its source."""
    kinds = [(node, kind) for node in nodes if (kind := node.kind) is not None]
    if not kinds:
        return None, ""
    if given is not None:
        return given, "--price"
    total = sum(node.gpus * (kind.price if node.price is None else node.price) for node, kind in kinds)
    assumed = any(node.price is None for node, _ in kinds)
    per_hour = total / sum(node.gpus for node, _ in kinds)
    return per_hour, f"assumed: {hardware.PRICES_ASSUMED}" if assumed else "--cluster"


Known = Literal["prepared", "counted", "sampled", "estimated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLong:
    """How many of the counted pairs of a split are over the length limits; `models` share a tokenizer."""

    models: tuple[str, ...]
    dataset: str
    split: str
    too_long: int
    pairs: int
    known: Known
    draw: DrawSpec

    def __str__(self) -> str:
        about = {
            "sampled": f", of the first {self.pairs} that are drawn",
            "estimated": f", about: taking {BYTES_PER_TOKEN} bytes for a token",
        }.get(self.known, "")
        return (
            f"over --max-prompt-tokens {self.draw.max_prompt_tokens} or --max-response-tokens "
            f"{self.draw.max_response_tokens}, left out: {self.too_long} of {self.pairs} pairs of {self.dataset}/{self.split} "
            f"for {', '.join(self.models)}{about}"
        )


class Wanted(NamedTuple):
    """A set that is prepared with one tokenizer: one of its stages, the set, the models, and a stage of each rendering."""

    stage: PrepareStage
    spec: DatasetSpec
    models: dict[str, None]
    renderings: dict[Rendering, PrepareStage]


def too_long(plans: Sequence[TrialPlan], store: Store) -> tuple[list[TooLong], list[str]]:
    """Return what each set loses to the length limits, and the messages for first rows that a template refuses.

    Sets whose rows were never fetched are left out.
    """
    wanted: dict[tuple[str, str, DrawSpec], Wanted] = {}
    for plan in plans:
        last = [stage.prepared for stage in plan.evaluations[-len(plan.spec.eval_sets) :]]
        sets = zip([plan.train.prepared, *last], [plan.spec.train_set, *plan.spec.eval_sets], strict=False)
        for stage, spec in sets:
            place = (stage.base.tokenizer_key, stage.split.digest, stage.draw)
            item = wanted.setdefault(place, Wanted(stage, spec, {}, {}))
            item.models[stage.base.name] = None
            item.renderings.setdefault(stage.rendering, stage)
    rows: dict[str, Sequence[Pair]] = {}
    found, refused = [], []
    for stage, spec, models, renderings in wanted.values():
        manifest = store.sound_manifest(stage.kind, stage.key)
        known: Known = "prepared"
        if manifest is not None and "too_long" in manifest["info"]:
            left_out = int(manifest["info"]["too_long"])
            pairs = int(manifest["info"]["pairs"]) + left_out
        else:
            digest = stage.split.digest
            if digest not in rows:
                rows[digest] = _rows(stage, spec, store)
            left_out, pairs, known = _counted(stage, rows[digest])
            said = (_refusal(item, rows[digest]) for item in renderings.values())
            refused += [
                f"{', '.join(models)} on {stage.split.name}/{stage.split.split}, {why}" for why in said if why
            ]
        if left_out:
            found.append(
                TooLong(
                    models=tuple(models),
                    dataset=stage.split.name,
                    split=stage.split.split,
                    too_long=left_out,
                    pairs=pairs,
                    known=known,
                    draw=stage.draw,
                )
            )
    return found, refused


def _refusal(stage: PrepareStage, pairs: Sequence[Pair]) -> str:
    """Return why the model's template refuses the first drawn row; "" if it does not, or is not on this machine."""
    from trainers.pairs.tokens import Counts, draw_order, iter_tokens

    try:
        tokenizer = _tokenizer(stage)
        first = [pairs[row] for row in draw_order(len(pairs), stage.draw)[:1]]
        if tokenizer is not None and first:
            draw = replace(stage.draw, max_pairs=None, max_prompt_tokens=ANY, max_response_tokens=ANY)
            list(iter_tokens(first, tokenizer, draw, stage.rendering, Counts()))
    except (DataError, ModelError) as error:
        return str(error)
    return ""


def _rows(stage: PrepareStage, spec: DatasetSpec, store: Store) -> Sequence[Pair]:
    kept = pairs_of(store, stage.split.digest)
    if kept or not (spec.source.startswith(BUILTIN) or Path(spec.source).exists()):
        return kept
    return list(sources.iter_pairs(spec, stage.split.split, []))


def _counted(stage: PrepareStage, pairs: Sequence[Pair]) -> tuple[int, int, Known]:
    """Return how many pairs are too long, how many were counted, and how that is known."""
    from trainers.pairs.tokens import Counts, draw_order, iter_tokens

    draw = stage.draw
    if not any(_over(pair, draw, bytes_per_token=1, added=TEMPLATE_TOKENS) for pair in pairs):
        return 0, len(pairs), "counted"
    sampled = len(pairs) > MOST and (draw.max_pairs or len(pairs)) > MOST
    if sampled:
        pairs = [pairs[row] for row in draw_order(len(pairs), draw)[:MOST]]
        draw = replace(draw, max_pairs=None)
    tokenizer = _tokenizer(stage)
    if tokenizer is None:
        drawn = [pairs[row] for row in draw_order(len(pairs), draw)[: draw.max_pairs]]
        over = sum(_over(pair, draw, bytes_per_token=BYTES_PER_TOKEN, added=0) for pair in drawn)
        return over, len(drawn), "estimated"
    counts, kept = Counts(), 0
    try:
        for _ in iter_tokens(pairs, tokenizer, draw, "response", counts):
            kept += 1
    except (DataError, ModelError):
        # Unless all of them are too long, this is another fault of the data or the model, which `run` reports.
        if kept or counts.too_long < len(pairs):
            return 0, len(pairs), "counted"
    return counts.too_long, counts.too_long + kept, "sampled" if sampled else "counted"


def _over(pair: Pair, draw: DrawSpec, *, bytes_per_token: int, added: int) -> bool:
    """Return whether a text is over its limit at `bytes_per_token`, with `added` tokens for each message."""

    def tokens(*messages: Message) -> float:
        texts = (message.content + message.fields for message in messages)
        return sum(len(text.encode()) / bytes_per_token + added for text in texts)

    prompt = tokens(*pair.prompt) + len(pair.tools.encode()) / bytes_per_token
    responses = (tokens(*turns) for turns in pair.responses)
    return prompt > draw.max_prompt_tokens or max(responses) > draw.max_response_tokens


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
