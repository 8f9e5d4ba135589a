"""Sweeps from Python: `grid` declares one to plan and run; `open_sweep` opens the results in a storage.

The words are the flags of the command line, and the same code carries them out.
"""

import contextlib
import dataclasses
import io
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from orchestrator.cli import run as commands
from orchestrator.cli.inspect import state_and_cause
from orchestrator.cli.options import Options, Plan, Retry, Run, Status
from orchestrator.cli.session import PIPE_WIDTH, Session, open_session
from orchestrator.cli.terminal import console_on
from orchestrator.plan.outlook import Outlook
from orchestrator.report.comparison import CONTROLS, Analysis
from orchestrator.report.page import HTML, known_baseline, said_conclusions, write_full_report
from orchestrator.report.results import TrialResult, all_scores, on_common_pairs, sweep_results, trial_rows
from orchestrator.report.summary import ensemble_table, statistics_tables
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep
from orchestrator.store.artifacts import WEIGHTS
from orchestrator.store.leases import live_drivers
from orchestrator.store.records import TrialNote, read_state
from trainers.command import parse
from trainers.data.records import Pair
from trainers.errors import SpecError, nearest

if TYPE_CHECKING:
    import pandas as pd

By = Literal["category", "set", "model"]
METRICS = ("accuracy", "loss", "abs_margin", *CONTROLS)


def grid(name: str, **words: Any) -> "DeclaredSweep":
    """Declare every model with every reward type on every training set at every seed.

    `words` are the flags of `rmsweep full_grid --help` with `_` for `-`: one value or a list; where a flag takes KEY=VALUE, a
    mapping does as well. Raises SpecError.
    """
    return DeclaredSweep(name, words)


class DeclaredSweep:
    """A declared sweep; nothing has been read or started."""

    def __init__(self, name: str, words: dict[str, Any]) -> None:
        self.name, self._words = name, {"name": name, **words}
        self._session(Plan())

    def plan(self, price: float | None = None) -> "SweepPlan":
        """Return what would run, on which devices, for how long and at what price ($ per GPU-hour). Raises SweepError."""
        said = io.StringIO()
        console = console_on(said, PIPE_WIDTH)
        session = dataclasses.replace(self._session(Plan(price=price)), console=console)
        found = commands.plan_only(session, _whole_grid)
        return SweepPlan(outlook=found, text=said.getvalue())

    def run(self, backend: Literal["inline", "ray"] | None = None, *, retry: bool = False) -> "SweepResults":
        """Run what is missing, or with `retry` what has failed, and return the results, failed trials included.

        Raises SweepError for the user's mistakes before anything starts, and KeyboardInterrupt when stopped: the next run
        goes on from there.
        """
        session = self._session(Retry() if retry else Run(), **({"backend": backend} if backend else {}))
        for grid in commands.rounds(session, _whole_grid, again=retry):
            work = commands.ready(session, grid, again=retry)
            written = commands.carry_out(session, work)
        commands.evict_weights(session, commands.asked(session, work, written.results))
        results = SweepResults(session)
        session.say(repr(results))
        return results

    def _session(self, command: Plan | Run | Retry, **changes: Any) -> Session:
        options = dataclasses.replace(_options(self._words | changes), command=command)
        return open_session(options, self.name, Path.cwd(), command=())


def _whole_grid(chosen: Selection) -> Sweep:
    return chosen.sweep(chosen.trials())


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """A sweep's plan: numbers in `outlook`; printed, the table of the command `plan`."""

    outlook: Outlook
    text: str

    def __repr__(self) -> str:
        return self.text


def open_sweep(storage: str | Path, name: str) -> "SweepResults":
    """Open a sweep's results in a storage, whoever ran it. Raises SpecError where there is none of that name."""
    options = dataclasses.replace(_options({"storage": storage, "name": name}), command=Status())
    return SweepResults(open_session(options, name, Path.cwd(), command=()))


class SweepResults:
    """A sweep's trials, scores, statistics, figures and weights, as they were in the storage when it was opened."""

    def __init__(self, session: Session) -> None:
        self.name, self._store = session.sweep_name, session.store
        self._declaration = session.declaration()
        self._state = read_state(self.name, self._store)
        self._running = self._state.driver in live_drivers(self._store.root)

    @cached_property
    def trials(self) -> list[TrialResult]:
        """Every trial of the sweep, in plan order; incomplete ones may lack scores."""
        return sweep_results(self._declaration, self._store)

    def failed(self) -> dict[str, str]:
        """Return why trials are not complete, by name."""
        said = {item.record.name: self._said(item) for item in self.trials}
        return {name: cause or state for name, (state, cause) in said.items() if state != "complete"}

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row for each trial and evaluation set (and kept epoch): parameters, state, cause and metrics."""
        import pandas as pd

        states = {item.record.key: self._said(item) for item in self.trials}
        rows = []
        for row in trial_rows(self.trials):
            state, cause = states[row["key"]]
            parameters = json.loads(row.pop("parameters"))
            # The column `loss` is the measured one.
            parameters["loss_function"] = parameters.pop("loss", None)
            # The trial's name and state first, then its parameters, then its metrics.
            row = {"trial": row["trial"], "state": state, "cause": cause, **parameters, **row}
            rows.append(row | {"state": state})
        return pd.DataFrame(rows)

    def pairs(self, evaluation_set: str | None = None) -> "pd.DataFrame":
        """Return one row for each trial and pair: rewards, margin, and the texts of prompt, chosen and rejected response."""
        import pandas as pd

        known = {item.dataset for trial in self.trials for item in trial.record.evaluations}
        if evaluation_set is not None:
            self._require("evaluation set", evaluation_set, known)
            known = {evaluation_set}
        digests = {item.dataset: item.dataset_digest for trial in self.trials for item in trial.evaluations}
        texts = {name: pairs_of(self._store, digests[name]) for name in known & digests.keys()}
        tables = [pd.DataFrame()]
        for trial in self.trials:
            if not trial.evaluations:
                continue
            table = all_scores(trial, self._store).to_pandas().rename(columns={"dataset": "evaluation_set"})
            table = table[table["evaluation_set"].isin(known)]
            told = {name: getattr(trial.record, name) for name in ("model", "reward", "train_set", "seed")}
            table = pd.DataFrame({"trial": trial.record.name, **told}, index=table.index).join(table)
            table["margin"] = table["chosen_reward"] - table["rejected_reward"]
            places = zip(table["evaluation_set"], table["index"], strict=True)
            said = [rows[row] if (rows := texts[name]) else None for name, row in places]
            table["prompt"] = [pair and _prompt_of(pair) for pair in said]
            for name in ("chosen", "rejected"):
                table[name] = [pair and getattr(pair, name) for pair in said]
            tables.append(table)
        return pd.concat(tables[1:] or tables, ignore_index=True)

    def difference(
        self, first: str, second: str, by: By = "category", metric: str = "accuracy"
    ) -> "pd.DataFrame":
        """Return first − second of a metric with its 95 % interval, as the report has it: by category, set or model.

        Raises SpecError for a metric that the report knows no interval of.
        """
        import pandas as pd

        results = on_common_pairs(self.trials)
        for reward in (first, second):
            self._require("reward type", reward, dict.fromkeys(item.record.reward for item in results))
        if first == second:
            raise SpecError(f"{first} − {second} is 0; give two reward types.")
        self._require("difference by", by, typing.get_args(By))
        self._require("interval of", metric, METRICS)
        analysis, rows = Analysis(results, first), []
        estimator = analysis.control if metric in CONTROLS else analysis.difference
        for scope in analysis.single_sets() if by == "set" else analysis.categories():
            place = {"train_set": scope.train_set, "category": scope.category}
            place["evaluation_set"] = scope.dataset
            for model in analysis.models if by == "model" else [None]:
                found = estimator(scope, metric, model and [model], other=second)
                if found is None:
                    continue
                estimate = found.estimate
                said = {"difference": estimate.value, "low": estimate.low, "high": estimate.high}
                said["p"] = found.p_pairs if estimate.p is None else estimate.p
                counts = {"models": len(found.models), "seeds": found.seeds, "pairs": found.pairs}
                of = {name: value for name, value in {**place, "model": model}.items() if value}
                rows.append({**of, **said, "over": found.over, **counts})
        return pd.DataFrame(rows)

    def table(self, name: str) -> "pd.DataFrame":
        """Return one of the report's tables of statistics, such as "power" or "scaling". Raises SpecError with the known names."""
        baseline = known_baseline(self._declaration, self._store.local_sweep_dir(self.name) / "report", None)
        analysis = Analysis(on_common_pairs(self.trials), baseline)
        tables = {table.name: table for table in statistics_tables(analysis)}
        self._require("table", name, tables)
        return tables[name].frame()

    def ensembles(self) -> "pd.DataFrame":
        """Return the accuracies of the mean reward of all seeds of a model, beside those of a seed alone, set by set."""
        return ensemble_table(self.trials).frame()

    def figure(self, name: str = "accuracy_by_category") -> "FigureFiles":
        """Return one of the report's figures, which a notebook shows. Raises SpecError with the known names."""
        folder = self._written() / "figures"
        self._require("figure", name, sorted(file.stem for file in folder.glob("*.svg")))
        return FigureFiles(svg=folder / f"{name}.svg", png=folder / f"{name}.png")

    def best_of_n(self) -> "pd.DataFrame":
        """Return best of n by each reward, as sweeps/best_of_n.py found it: a row for each cell, set of candidates and n.

        Raises SpecError where that has not been run of this sweep.
        """
        import pandas as pd

        named = (item.partition("/") for item in self._declaration.artifacts)
        for key in (key for kind, _, key in named if kind == "analyse" and self._store.complete(kind, key)):
            file = self._store.read("analyse", key) / "best_of.parquet"
            if file.is_file():
                return pd.read_parquet(file)
        raise SpecError(f"{self.name} has no best of n; run `rmsweep best_of_n` with the sweep's own flags.")

    def report(self) -> Path:
        """Write the report if it is not up to date, and return its page."""
        return self._written() / HTML

    def model_path(self, trial: str) -> Path:
        """Return the folder with a trial's trained model, for transformers; `trial` is its name.

        Raises SpecError for an unknown or untrained trial, StorageError if its weights were evicted.
        """
        records = {item.name: item for item in self._declaration.trials}
        self._require("trial", trial, records)
        key = records[trial].key
        if not self._store.complete("train", key):
            raise SpecError(f"{trial} has no weights: {self.failed().get(trial, 'it is not trained')}")
        return self._store.read(WEIGHTS, key, "model") / "model"

    def __repr__(self) -> str:
        complete = sum(item.complete for item in self.trials)
        lines = [f"{self.name} in {self._store.root}: {complete} of {len(self.trials)} trials complete"]
        lines += [f"missing: {name}: {cause}" for name, cause in self.failed().items()]
        return "\n".join([*lines, *said_conclusions(self._store.local_sweep_dir(self.name) / "report")])

    def _require(self, kind: str, name: str, known: Iterable[str]) -> None:
        if name not in (known := list(known)):
            raise SpecError(f"{self.name} has no {kind} {name}; {nearest(str(name), known)}")

    def _written(self) -> Path:
        return write_full_report(self._declaration, self._store).folder

    def _said(self, result: TrialResult) -> tuple[str, str]:
        note = self._state.trials.get(result.record.key, TrialNote())
        return state_and_cause(result, note, self._running)


def _prompt_of(pair: Pair) -> str:
    """Write a prompt; with the roles if it has several turns."""
    roles = len(pair.prompt) > 1
    return "\n\n".join(f"{turn.role}: {turn.content}" if roles else turn.content for turn in pair.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureFiles:
    """One figure as files; a notebook shows it."""

    svg: Path
    png: Path

    def _repr_png_(self) -> bytes:
        return self.png.read_bytes()


def _options(words: Mapping[str, Any]) -> Options:
    """Return the words as flags. Raises SpecError for an unknown word or a value that the flag would not take."""
    # Methods take the place of the others.
    fields = dataclasses.fields(Options)
    known = {field.name: field.default for field in fields if field.name not in ("command", "json")}
    flags: list[str] = []
    for word, value in words.items():
        if word not in known:
            raise SpecError(f"grid has no {word}; {nearest(word, known)}")
        if value is None:
            continue
        is_switch = isinstance(known[word], bool)
        texts = [] if is_switch else [str(item) for item in _listed(value)]
        if isinstance(value, bool) != is_switch or any(re.match(r"-[^\d.]", text) for text in texts):
            right = "True or False" if is_switch else "a value, not True or False, and not a flag"
            raise SpecError(f"{word}={value!r}: give {right}.")
        if len(texts) > 1 and not isinstance(known[word], tuple):
            raise SpecError(f"{word}={value!r}: give one value.")
        if value is not False:
            flags += [f"--{word.replace('_', '-')}", *texts]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(Options, flags, prog="grid", config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as error:
        # tyro says it in a box, with help below.
        text = " ".join(re.sub("[─│╭╮╰╯]", " ", said.getvalue()).split())
        raise SpecError(re.split(" Argument helptext| Available sub| For full helptext", text)[0]) from error


def _listed(value: Any) -> Iterator[Any]:
    """Yield one value or several; a mapping's items as KEY=VALUE, with / between the parts of a key."""
    if isinstance(value, Mapping):
        for key, items in value.items():
            name = "/".join(map(str, key)) if isinstance(key, tuple) else str(key)
            several = isinstance(items, list | tuple | range)
            yield f"{name}={','.join(map(str, items)) if several else items}"
    elif isinstance(value, str | Path) or not hasattr(value, "__iter__"):
        yield value
    else:
        yield from value
