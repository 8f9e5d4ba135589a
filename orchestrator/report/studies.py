"""What every analysis is made of: its files, and the frame of a study of a finished sweep's scores.

A study reads the complete trials of one sweep, on the pairs that all of them have, and shows what it finds as tables. A file in
sweeps/ asks its question and computes the answer. An analysis is written as results.json, rows and tables as parquet,
summary.md and figures.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from orchestrator.report.house_style import rendered
from orchestrator.report.results import ScoredTrials, TrialResult, by_seeds, results_of, scored
from orchestrator.report.tables import Table, reward_title
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt, Store
from orchestrator.store.records import read_declaration
from trainers.errors import SpecError

Rows = Sequence[Mapping[str, Any]]


def write_analysis(
    attempt: Attempt,
    title: str,
    paragraphs: Sequence[str],
    tables: Sequence[Table] = (),
    *,
    results: Mapping[str, Any],
    rows: Mapping[str, Rows] | None = None,
    figures: Mapping[str, Callable[[], Any]] | None = None,
) -> None:
    """Write the findings of an analysis into its folder, and `results` into its manifest as well.

    `results` may hold dataclasses, such as estimates. `rows` and `figures` are by file name; a figure's function returns None if
    there is nothing to draw.
    """
    text = json.dumps(results, indent=1, ensure_ascii=False, default=asdict)
    (attempt.directory / "results.json").write_text(text)
    attempt.info.update(results=json.loads(text))
    for name, found in (rows or {}).items():
        (attempt.directory / f"{name}.parquet").write_bytes(as_parquet(found))
    for table in tables:
        (attempt.directory / f"{table.name}.parquet").write_bytes(table.parquet())
    (attempt.directory / "summary.md").write_text(as_markdown(title, paragraphs, tables))
    for name, draw in (figures or {}).items():
        if drawn := rendered(name, name, "", draw):
            (attempt.directory / "figures").mkdir(exist_ok=True)
            (attempt.directory / "figures" / f"{name}.png").write_bytes(drawn.png)
            (attempt.directory / "figures" / f"{name}.svg").write_bytes(drawn.svg)


def as_parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return bytes(sink.getvalue().to_pybytes())


def as_markdown(
    title: str, paragraphs: Iterable[str], tables: Sequence[Table], ending: Iterable[str] = ()
) -> str:
    shown = (text for table in tables for text in (f"{table.title}. {table.note}", table.markdown()))
    return "\n\n".join([f"# {title}", *paragraphs, *shown, *ending]) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The findings of a study: sentences, tables, the content of results.json, and rows by file name."""

    said: Sequence[str] = ()
    tables: Sequence[Table]
    results: Mapping[str, Any]
    rows: Mapping[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A question to the scores of a sweep. Raise `version` when `find` gives other results for the same scores.

    `sweep` is the default of --sweep.
    """

    name: str
    version: int
    find: Callable[[list[TrialResult], AnalysisInputs], Findings]
    sweep: str = "full_grid"

    def compute(self, stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
        """Compute the findings and write them, below sentences about the data."""
        results, basis = results_of(stage.parameters, inputs.store)
        found = self.find(results, inputs)
        write_analysis(
            attempt,
            inputs.name,
            [basis, *found.said],
            found.tables,
            results=found.results,
            rows=found.rows,
        )


def titled(rows: Rows) -> list[dict[str, Any]]:
    """Return the rows with the reward types as the field writes them."""
    return [{**row, "reward": reward_title(row["reward"])} for row in rows]


def learned_cells(results: Sequence[TrialResult]) -> Iterator[tuple[dict[str, Any], list[TrialResult]]]:
    """Yield the learned trials that differ only in their seed, and the labels of their rows."""
    for trials in by_seeds([item for item in results if item.learned]):
        record = trials[0].record
        names = {"train_set": record.train_set, "model": record.model, "reward": record.reward}
        yield {**names, "seeds": len(trials)}, trials


def scored_of(store: Store, sweep: str, model: str, train_set: str) -> tuple[ScoredTrials, Mapping[str, Any]]:
    """Return a model's complete trials on a training set, and the parameters of the first. Raises SpecError if there is none."""
    complete = scored(store, sweep)
    trials = tuple(item for item in complete.trials if (item.model, item.train_set) == (model, train_set))
    if not trials:
        raise SpecError(
            f"--sweep {sweep} has no complete trial of {model} on {train_set}; give its --models and --train-set."
        )
    declared = {item.name: item.parameters for item in read_declaration(sweep, store).trials}
    return replace(complete, trials=trials), declared[trials[0].name]
