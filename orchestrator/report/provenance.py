"""Where a sweep's numbers come from: commands, library versions, hardware, and what is missing of it."""

import collections
import itertools
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.report.results import TrialResult
from orchestrator.report.tables import Table, columns
from orchestrator.store.artifacts import Store
from orchestrator.store.records import SweepState, TrialNote
from trainers.errors import Damaged

_KEPT_FLAGS = ("--storage", "--name", "--profile")


def run_command(state: SweepState) -> str:
    """The command that computed the sweep last; "" where none is noted."""
    return shlex.join(("python", *state.command)) if state.command else ""


def report_command(state: SweepState, sweep: str) -> str:
    """The command that makes the report again."""
    script, *words = state.command or ("sweeps/full_grid.py", "--name", sweep)
    kept: list[str] = []
    for word, value in itertools.pairwise((*words, "")):
        flag, given, _ = word.partition("=")
        if flag in _KEPT_FLAGS:
            kept += [word] if given else [word, value]
    return shlex.join(("python", script, "report", *kept))


def made_with(results: Sequence[TrialResult], store: Store) -> Table:
    """Library versions and hardware of every training and evaluation, from their manifests."""
    seen: dict[str, collections.Counter[str]] = {}
    for stage, key in _artifacts(results):
        try:
            manifest = store.manifest(stage, key)
        except Damaged:
            continue
        if manifest is None:
            continue
        for what, value in _facts(stage, manifest):
            seen.setdefault(what, collections.Counter())[value] += 1
    rows = [(what, value, count) for what, values in seen.items() for value, count in sorted(values.items())]
    return Table(
        name="made_with",
        title="Versions and hardware",
        note="From the manifests of all trainings and evaluations; where several values stand, they differ.",
        columns=columns(("what", "what"), ("value", "value"), ("artifacts", "artifacts")),
        rows=tuple(rows),
    )


def _artifacts(results: Sequence[TrialResult]) -> Iterator[tuple[str, str]]:
    for result in results:
        if result.trained:
            yield "train", result.record.key
        wanted = {(item.dataset, item.epoch): item.key for item in result.record.evaluations}
        for item in result.evaluations:
            yield "evaluate", wanted[item.dataset, item.epoch]


def _facts(stage: str, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from manifest["versions"].items()
    yield f"host ({stage})", manifest["host"]
    placement = manifest["info"].get("placement")
    if placement:
        laid = (
            f"{placement.get('world_size')} × {placement.get('device')}, ZeRO {placement.get('zero_stage')}"
        )
        yield "placement (train)", laid
    if "backend" in manifest["info"]:
        yield "backend (train)", manifest["info"]["backend"]


def trials_table(results: Sequence[TrialResult]) -> Table:
    """Every trial with its training."""
    rows = [
        (
            result.record.model,
            result.record.reward,
            result.record.train_set,
            result.record.seed,
            "complete" if result.complete else "missing",
            result.learned if result.trained else None,
            result.train_accuracy,
            f"{len(result.evaluations)}/{len(result.record.evaluations)}",
            result.perf.get("pairs_per_s"),
            result.perf.get("peak_mem_gb"),
        )
        for result in results
    ]
    return Table(
        name="trials",
        title="Trials",
        note="Learned: the last epoch's training accuracy lies two standard errors above ½. "
        "What was not learned enters no mean.",
        columns=columns(
            ("model", "model"),
            ("reward", "reward"),
            ("train_set", "trained on"),
            ("seed", "seed"),
            ("state", "state"),
            ("learned", "learned"),
            ("train_accuracy", "training accuracy"),
            ("evaluations", "sets evaluated"),
            ("pairs_per_s", "pairs/s", ".1f"),
            ("peak_mem_gb", "peak memory, GB", ".2f"),
        ),
        rows=tuple(rows),
    )


def holes_table(results: Sequence[TrialResult], state: SweepState) -> Table:
    """What the report lacks, and why."""
    rows = []
    for result in results:
        if result.complete:
            continue
        note = state.trials.get(result.record.key, TrialNote())
        found = {(item.dataset, item.epoch) for item in result.evaluations}
        lacks = [] if result.trained else ["training"]
        lacking = [item for item in result.record.evaluations if (item.dataset, item.epoch) not in found]
        lacks += dict.fromkeys(item.dataset for item in lacking)
        cause = note.message or "; ".join(result.faults) or "not run"
        rows.append((result.record.name, ", ".join(lacks), cause))
    return Table(
        name="holes",
        title="What is missing",
        note="Nothing is filled in for it: every number above is of what is there.",
        columns=columns(("trial", "trial"), ("lacks", "lacks"), ("cause", "cause")),
        rows=tuple(rows),
    )
