"""What the MLflow run of a trial holds: parameters, tags, data sets and points. Pure: no client, no server."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from orchestrator.report.curves import CURVES
from orchestrator.report.results import TrialResult
from orchestrator.spec.redaction import redacted
from orchestrator.spec.trials import CATEGORIES

# Raised by hand when the same results would give another run, so that `sync` writes the runs that are there anew.
VERSION = 1
# The most telling first: a run of very many sets gets as many of them as fit.
EVALUATION_METRICS = ("accuracy", "accuracy_length_controlled", "accuracy_leak_free", "loss", "abs_margin")
MOST_KEYS = 59
PERFORMANCE = ("tokens_per_s", "pairs_per_s", "step_s", "peak_mem_gb")
# What a trial's key does not hold may differ between commands that share its run.
OUTSIDE_KEY = frozenset({"model_source", "model_revision", "max_eval_pairs"})
DIGEST_TAG = "rmsweep.digest"


class Point(NamedTuple):
    """One value of a metric; `time` is a Unix time in milliseconds."""

    name: str
    value: float
    time: int
    step: int


class Input(NamedTuple):
    """A data set that a trial was trained or evaluated on."""

    name: str
    digest: str
    context: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContent:
    """Everything but status and times of a run. `config` is config.json, `scored` says which scores there are."""

    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    inputs: tuple[Input, ...]
    points: tuple[Point, ...]
    config: str
    scored: tuple[tuple[str, int | None, float], ...]

    @property
    def digest(self) -> str:
        """Changes with whatever the run shows."""
        parts = [VERSION, *(getattr(self, name) for name in self.__slots__)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def run_content(result: TrialResult, curve: Sequence[Mapping[str, Any]]) -> RunContent:
    """What the run of a trial holds; `curve` are the rows of its training that are shown."""
    record = result.record
    known = {name: redacted(str(value)) for name, value in record.parameters.items()}
    sets = {(record.train_set, record.train_digest): "training"}
    sets |= {(item.dataset, item.dataset_digest): "evaluation" for item in record.evaluations}
    points = (*_curves(curve), *_final_metrics(result))
    return RunContent(
        # Parameters cannot change; what is not in the trial's key can, and is a tag.
        parameters={name: value for name, value in known.items() if name not in OUTSIDE_KEY},
        tags={f"rmsweep.{name}": value for name, value in known.items() if name in OUTSIDE_KEY},
        inputs=tuple(Input(name, digest, context) for (name, digest), context in sets.items()),
        points=tuple(point for point in points if math.isfinite(point.value)),
        config=redacted(json.dumps(asdict(record), indent=1, ensure_ascii=False)),
        scored=tuple((item.dataset, item.epoch, item.finished) for item in result.evaluations),
    )


def _curves(rows: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    for row in rows:
        for name in CURVES:
            yield Point(f"train/{name}", row[name], milliseconds(row["time"]), int(row["step"]))


def _final_metrics(result: TrialResult) -> Iterator[Point]:
    for name in PERFORMANCE:
        if name in result.perf:
            yield Point(f"perf/{name}", result.perf[name], milliseconds(result.trained_at), 0)
    other = len(CURVES) + len(PERFORMANCE) + len(CATEGORIES)
    sets = {item.dataset for item in result.record.evaluations}
    each = max(1, (MOST_KEYS - other) // max(1, len(sets)))
    # Where only the last epoch is evaluated, its point has always been at step 0.
    curve = any(item.epoch != result.last_epoch for item in result.record.evaluations)
    for evaluation in result.evaluations:
        step = evaluation.epoch or 0 if curve else 0
        for name in EVALUATION_METRICS[:each]:
            if name in evaluation.metrics:
                value, when = evaluation.metrics[name], milliseconds(evaluation.finished)
                yield Point(f"eval/{_metric_part(evaluation.dataset)}/{name}", value, when, step)
    for category, accuracy in result.category_accuracy().items():
        finished = max(item.finished for item in result.final if item.category == category)
        yield Point(f"category/{category}/accuracy", accuracy, milliseconds(finished), 0)


def _metric_part(name: str) -> str:
    """MLflow takes letters of every script, but no marks; the colons stand in no name of a set."""
    return re.sub(r"[^\w.-]", lambda mark: f":{ord(mark[0]):x}:", name)


def milliseconds(seconds: float) -> int:
    """A Unix time as MLflow has it."""
    return round(seconds * 1000)
