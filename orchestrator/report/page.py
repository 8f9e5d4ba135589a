"""The page of a sweep's report: statistics, figures and where the numbers come from, in one self-contained HTML file.

<storage>/sweeps/<sweep>/report/summary.md  report.html  report.json  pairs.parquet  figures/*.png|svg  tables/*.csv|parquet
<storage>/sweeps/<sweep>/report/compare-<other>/compare.html  figures/  tables/
"""

import base64
import collections
import contextlib
import hashlib
import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.report.audit import audit_sweep
from orchestrator.report.by_axis import axis_tables
from orchestrator.report.comparison import Analysis, SetOutcomes, set_outcomes
from orchestrator.report.conclusions import PREFERENCE, conclusions, preference
from orchestrator.report.figures import every_figure
from orchestrator.report.house_style import DrawnFigure
from orchestrator.report.published import spec_difference
from orchestrator.report.results import (
    TrialResult,
    TrialState,
    curve_rows,
    left_out_lines,
    on_common_pairs,
    trial_rows,
    trial_states,
    with_scores,
)
from orchestrator.report.studies import as_markdown, as_parquet
from orchestrator.report.summary import Written, accuracy_table, audit_tables, statistics_tables
from orchestrator.report.tables import NOTHING, Table, Value, reward_title, sentence
from orchestrator.spec.datasets import pairs_of
from orchestrator.store.artifacts import Store, versions
from orchestrator.store.records import Declaration, SweepState, TrialNote, read_state
from trainers.data.audit import Audit
from trainers.data.records import Pair
from trainers.errors import SpecError
from trainers.storage import replace

# Raised by hand when the same results would give other pages.
VERSION = 13
NOTE = "report.json"
HTML = "report.html"
SUMMARY = "summary.md"
PAIRS = "pairs.parquet"
# Examples that a page shows.
SHOWN = 200
PAPER_LINK = "https://arxiv.org/abs/2507.07981"
_KEPT_FLAGS = ("--storage", "--name", "--profile")

# Opens a progress bar of that label; what it yields is told how many are done of how many.
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page below the tables of statistics; `lines` are labels and texts to copy."""

    title: str
    anchor: str
    text: str = ""
    lines: tuple[tuple[str, str], ...] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows, its conclusions first; `warning` says what it lacks, `command` makes it again."""

    title: str
    lead: str
    conclusions: Sequence[str]
    warning: str
    command: str
    figures: Sequence[DrawnFigure]
    tables: Sequence[Table]
    sections: Sequence[Section] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    rewards: Sequence[str] = ()


def write_full_report(
    declaration: Declaration,
    store: Store,
    bar: Bar = lambda label: contextlib.nullcontext(lambda done, total: None),
    *,
    anew: bool = False,
    baseline: str | None = None,
    price: float | None = None,
) -> Written:
    """Write the report, unless that of the same results is already there; where `anew`, in any case.

    The `baseline`, and the `price` in $ per GPU-hour, are kept until others are given. Raises SpecError where no trial has that
    reward type.
    """
    states = trial_states(declaration.trials, store)
    folder = store.local_sweep_dir(declaration.sweep) / "report"
    trials = folder.parent / "trials.parquet"
    baseline = known_baseline(declaration, folder, baseline)
    last = _note(folder)
    price = last.get("price") if price is None else price
    key = _key(declaration, states, store, baseline, price)
    there = all(file.is_file() for file in (folder / SUMMARY, folder / HTML, trials))
    if not anew and there and last.get("key") == key:
        return Written(folder, states, [*map(Table.of_json, last["tables"])], last["left_out"])
    results = with_scores(states, store)
    analysis = Analysis(on_common_pairs(results), baseline)
    audit, pairs = audit_sweep(declaration, store), pair_rows(analysis, store)
    page = _page(declaration.sweep, results, analysis, audit, store, bar, pairs, price)
    asked = ("accuracy_by_category", "differences", "power", "scaling", "suites")
    brief = [item for item in page.tables if item.name in asked or item.name.startswith("by_")]
    brief.sort(key=lambda item: item.name != "accuracy_by_category")
    replace(folder / SUMMARY, _summary(page, brief))
    write_page(folder, page, HTML)
    if audit.sets:
        replace(folder / "audit.json", json.dumps(audit.as_json(), indent=1, ensure_ascii=False) + "\n")
    replace(folder / PAIRS, as_parquet(pairs))
    # Two drivers that end at the same time both write it.
    replace(trials, as_parquet(trial_rows(results)))
    written = Written(folder, results, brief, left_out_lines(results, analysis.results))
    note = {
        "key": key,
        "baseline": baseline,
        "price": price,
        "sweep": declaration.sweep,
        "trials": len(results),
        "complete": sum(result.complete for result in results),
        "conclusions": page.conclusions,
        "tables": [asdict(table) for table in brief],
        "left_out": written.left_out,
    }
    for place in (folder, trials):
        store.share(place)
    # Last, as it says that the report is there.
    replace(folder / NOTE, json.dumps(note, indent=1, ensure_ascii=False))
    store.share(folder / NOTE)
    return written


def _summary(page: Page, brief: Sequence[Table]) -> str:
    """Return the page for a reader of text: its sentences and its `brief` tables, the audit, what is missing and the advice."""
    by_set = [table for table in page.tables if table.name == "sets"]
    below = [
        table
        for section in page.sections
        if section.anchor in ("audit", "missing")
        for table in section.tables
    ]
    ending = [f"{section.title}. {section.text}" for section in page.sections if section.text]
    said = [page.lead, *page.conclusions, *filter(None, [page.warning])]
    shown = [table for table in (accuracy_table(brief[0]), *brief[1:], *by_set, *below) if table.rows]
    return as_markdown(page.title, said, shown, ending)


def said_conclusions(folder: Path) -> list[str]:
    """Return the conclusions of the report in `folder`; none where there is no report."""
    return [str(sentence) for sentence in _note(folder).get("conclusions", ())]


def known_baseline(declaration: Declaration, folder: Path, asked: str | None) -> str | None:
    """Return the reward type that others are compared with: as asked, else as in the last report, else None: the first one.

    Raises SpecError where no trial has the type that was asked for.
    """
    kinds = list(dict.fromkeys(trial.reward for trial in declaration.trials))
    if asked is not None and asked not in kinds:
        raise SpecError(f"--baseline {asked}: the sweep has no such reward type; it has {', '.join(kinds)}.")
    kept = asked or _note(folder).get("baseline")
    return kept if kept in kinds else None


def write_page(folder: Path, page: Page, html: str) -> None:
    """Write the page as `html`, its tables and its figures into `folder`, and remove those of an earlier page."""
    files: dict[Path, bytes] = {folder / html: _template().render(page=page, paper=PAPER_LINK).encode()}
    for table in (*page.tables, *(table for section in page.sections for table in section.tables)):
        files[folder / "tables" / f"{table.name}.csv"] = table.csv().encode()
        files[folder / "tables" / f"{table.name}.parquet"] = table.parquet()
    for figure in page.figures:
        files[folder / "figures" / f"{figure.name}.png"] = figure.png
        files[folder / "figures" / f"{figure.name}.svg"] = figure.svg
    for file, content in files.items():
        replace(file, content)
    for file in (*folder.glob("figures/*.*"), *folder.glob("tables/*.*")):
        if file not in files:
            file.unlink()


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
    )
    environment.globals["encoded"] = lambda svg: base64.b64encode(svg).decode()
    environment.globals["reward_title"] = reward_title
    return environment.get_template("report.html.jinja")


def _key(
    declaration: Declaration,
    states: Sequence[TrialState],
    store: Store,
    baseline: str | None,
    price: float | None,
) -> str:
    """Return a hash of everything that the page depends on; no scores are read for it."""
    noted = read_state(declaration.sweep, store)
    evaluations = [item for trial in declaration.trials for item in trial.evaluations]
    # The audit and what leaked are read from these, where they are there.
    rows = {
        *(trial.train_digest for trial in declaration.trials),
        *(item.dataset_digest for item in evaluations),
    }
    tokens = {*(trial.prepared for trial in declaration.trials), *(item.prepared for item in evaluations)}
    read = [("dataset", key) for key in sorted(rows)] + [("prepare", key) for key in sorted(tokens)]
    parts = [
        VERSION,
        versions()["rmsweep"],
        declaration.sweep,
        baseline,
        price,
        [repr(item) for item in states],
        [(item.record.key, len(curve_rows(store, item.record.key))) for item in states if not item.trained],
        [(store.sound_manifest(*artifact) or {}).get("attempt") for artifact in read],
        noted.command,
        {key: note.message for key, note in noted.trials.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _note(folder: Path) -> dict[str, Any]:
    """Read report.json; empty where it cannot be read."""
    try:
        found = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _page(
    sweep: str,
    results: Sequence[TrialResult],
    analysis: Analysis,
    audit: Audit,
    store: Store,
    bar: Bar,
    pairs: Sequence[Mapping[str, Any]],
    price: float | None,
) -> Page:
    state = read_state(sweep, store)
    complete = sum(result.complete for result in results)
    by_axis = [*axis_tables(analysis)]
    tables = (*statistics_tables(analysis), *by_axis)
    figures, records = [], [result.record for result in results]
    curves = {(r.train_set, r.model, r.reward, r.seed): curve_rows(store, r.key) for r in records}
    with bar("figures") as step:
        for figure in every_figure(analysis, curves, by_axis):
            figures.append(figure)
            step(len(figures), 8 + len(by_axis))
    command = report_command(state, sweep)
    ran = (("Trained and evaluated by", shlex.join(("python", *state.command))),) if state.command else ()
    return Page(
        title=sweep,
        lead=f"{complete} of {len(results)} trials complete: {', '.join(analysis.models)}; "
        f"trained on {', '.join(analysis.train_sets)}.",
        conclusions=conclusions(analysis, audit),
        warning=warning(results, analysis.results),
        command=command,
        figures=figures,
        tables=tables,
        examples=shown_examples(pairs, analysis.rewards),
        rewards=analysis.rewards,
        sections=(
            Section(title="What could be fooling us", anchor="audit", tables=audit_tables(audit)),
            Section(title="Beside the paper", anchor="paper", tables=[spec_difference(results)]),
            Section(
                title="How it was made",
                anchor="made",
                lines=(*ran, ("This report", command)),
                tables=[
                    _time_table(results, store, price),
                    _made_with(results, store),
                    _trials_table(results),
                ],
            ),
            Section(title="Holes", anchor="missing", tables=[holes_table(results, state)]),
            Section(title=PREFERENCE, anchor="prefer", text=preference(analysis)),
        ),
    )


def pair_rows(analysis: Analysis, store: Store) -> list[dict[str, Any]]:
    """Return one row per training set, evaluation set and pair; texts that the store lacks are None.

    A margin is the mean over the models and seeds that have every type, in standard deviations of the set's rewards; `right` is
    the share of these trainings that rank the pair right.
    """
    return [
        row
        for item in set_outcomes(analysis, analysis.rewards)
        for row in _rows(item, pairs_of(store, item.dataset_digest))
    ]


def _rows(item: SetOutcomes, texts: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    for place, index in enumerate(item.index.tolist()):
        pair = texts[index] if index < len(texts) else None
        yield {
            "train_set": item.train_set,
            "evaluation_set": item.dataset,
            "category": item.category,
            "index": index,
            "prompt": pair and "\n\n".join(f"{turn.role}: {turn.content}" for turn in pair.prompt),
            "chosen": pair and pair.chosen,
            "rejected": pair and pair.rejected,
            **{f"{kind}_margin": float(margin_P[place]) for kind, margin_P in item.margin.items()},
            **{f"{kind}_right": float(right_P[place]) for kind, right_P in item.right.items()},
        }


def shown_examples(rows: Sequence[Mapping[str, Any]], rewards: Sequence[str]) -> list[dict[str, Any]]:
    """Return at most SHOWN rows with texts, equally many of each set, from both ends of the first type's lead over the others.

    Each has the keys by which the page sorts: `disagreement`, that lead, and `confidence`, the mean absolute margin.
    """
    sets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["prompt"] is not None:
            right, margin = (
                [float(row[f"{kind}_{what}"]) for kind in rewards] for what in ("right", "margin")
            )
            lead = right[0] - float(np.mean(right[1:] or 0.5))
            # Margins break ties between pairs that equally many trainings rank right.
            lead += 1e-3 * float(np.tanh(margin[0] - float(np.mean(margin[1:] or 0.0))))
            found = {**row, "disagreement": lead, "confidence": float(np.mean(np.abs(margin)))}
            sets.setdefault((row["train_set"], row["evaluation_set"]), []).append(found)
    each = SHOWN // max(1, len(sets))
    chosen: list[dict[str, Any]] = []
    for items in sets.values():
        items.sort(key=lambda row: row["disagreement"])
        chosen += (
            items if len(items) <= each else [*items[: each // 2], *items[len(items) + each // 2 - each :]]
        )
    return sorted(chosen, key=lambda row: -row["disagreement"])


def warning(results: Sequence[TrialResult], compared: Sequence[TrialResult]) -> str:
    """Say what the numbers lack: missing trials, and pairs over the length limits."""
    missing = sum(not result.complete for result in results)
    incomplete = f"incomplete: {missing} of {len(results)} trials are missing and are not imputed"
    return " ".join(map(sentence, [*([incomplete] if missing else []), *left_out_lines(results, compared)]))


def report_command(state: SweepState, sweep: str) -> str:
    script, *words = state.command or ("sweeps/full_grid.py", "--name", sweep)
    kept: list[str] = []
    for word, value in itertools.pairwise((*words, "")):
        flag, given, _ = word.partition("=")
        if flag in _KEPT_FLAGS:
            kept += [word] if given else [word, value]
    return shlex.join(("python", script, "report", *kept))


def _made_with(results: Sequence[TrialResult], store: Store) -> Table:
    """List the library versions and hardware of every training and evaluation, from their manifests."""
    facts = collections.Counter[tuple[str, str]]()
    for stage, manifest in _manifests(results, store):
        facts.update([*manifest["versions"].items(), (f"host ({stage})", manifest["host"])])
        info = manifest["info"]
        if laid := info.get("placement"):
            said = f"{laid.get('world_size')} × {laid.get('device')}, ZeRO {laid.get('zero_stage')}"
            facts["placement (train)", said] += 1
        if "backend" in info:
            facts["backend (train)", info["backend"]] += 1
    return Table(
        name="made_with",
        title="Versions and hardware",
        note="From the manifests of all trainings and evaluations; where several values stand, they differ.",
        columns="what value artifacts",
        rows=[
            {"what": what, "value": value, "artifacts": count}
            for (what, value), count in sorted(facts.items())
        ],
    )


def _time_table(results: Sequence[TrialResult], store: Store, price: float | None) -> Table:
    """Add up the time of all trainings and evaluations, and what it cost: an evaluation takes one device of its training's kind."""
    spent: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in results:
        device = NOTHING
        for stage, manifest in _manifests([result], store):
            laid, hours = manifest["info"].get("placement", {}), manifest["seconds"] / 3600
            device = {"cuda": "GPU", "cpu": "CPU"}.get(laid.get("device"), device)
            spent.setdefault((stage, device), []).append((hours, hours * laid.get("world_size", 1)))
    rows: list[dict[str, Value]] = []
    cost = 0.0
    for (stage, device), found in spent.items():
        hours, device_hours = map(sum, zip(*found, strict=True))
        paid = price * device_hours if price is not None and device == "GPU" else None
        cost += paid or 0.0
        line: dict[str, Value] = {"stage": stage, "device": device, "artifacts": len(found)}
        rows.append({**line, "hours": hours, "device_hours": device_hours, "cost": paid})
    note = "Wall-clock time of finished trainings and evaluations, and that times the devices of each; failed tries are not in it."
    if price is not None:
        note += f" At $ {price:g} per GPU-hour, $ {cost:,.2f} in all; hours on a CPU cost nothing here."
    return Table(
        name="time",
        title="Time and cost",
        note=note,
        columns=f"stage device artifacts hours device_hours{'' if price is None else ' cost'}",
        titles={"device_hours": "CPU- or GPU-hours", "cost": "cost, $"},
        rows=rows,
        forms={"hours": ".3f", "device_hours": ".3f", "cost": ",.2f"},
    )


def _manifests(results: Sequence[TrialResult], store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield stage and manifest of everything that the report is of; a damaged one is said among the holes."""
    for result in results:
        keys = [("train", result.record.key)] if result.trained else []
        for stage, key in (*keys, *(("evaluate", item.key) for item in result.evaluations)):
            if manifest := store.sound_manifest(stage, key):
                yield stage, manifest


def _trials_table(results: Sequence[TrialResult]) -> Table:
    return Table(
        name="trials",
        title="Trials",
        note="Learned: it fits its training pairs (the last epoch's accuracy on them lies two standard errors above ½), which "
        "says nothing about new pairs. Trials that did not learn enter no mean.",
        columns="model reward train_set seed state learned train_accuracy evaluations pairs_per_s peak_mem_gb artifact",
        titles={
            "train_accuracy": "training accuracy",
            "evaluations": "sets evaluated",
            "artifact": "log and weights, in the storage",
            "pairs_per_s": "pairs/s",
            "peak_mem_gb": "peak memory, GB",
        },
        rows=[
            {
                **{name: getattr(result.record, name) for name in ("model", "reward", "train_set", "seed")},
                "state": "complete" if result.complete else "missing",
                "learned": result.learned if result.trained else None,
                "train_accuracy": result.train_accuracy,
                "evaluations": f"{len(result.evaluations)}/{len(result.record.evaluations)}",
                **{name: result.perf.get(name) for name in ("pairs_per_s", "peak_mem_gb")},
                "artifact": f"artifacts/train/{result.record.key}" if result.trained else None,
            }
            for result in results
        ],
        forms={"pairs_per_s": ".1f", "peak_mem_gb": ".2f"},
    )


def holes_table(results: Sequence[TrialResult], state: SweepState) -> Table:
    """List the trials that the report lacks, and why."""
    rows = []
    for result in (item for item in results if not item.complete):
        found = {item.key for item in result.evaluations}
        lacks = [] if result.trained else ["training"]
        lacks += dict.fromkeys(item.dataset for item in result.record.evaluations if item.key not in found)
        note = state.trials.get(result.record.key, TrialNote())
        cause = note.message or "; ".join(result.faults) or "not run"
        rows.append({"trial": result.record.name, "lacks": ", ".join(lacks), "cause": cause})
    return Table(
        name="holes",
        title="What is missing",
        note="Missing results are not imputed: every number above is of the complete ones.",
        columns="trial lacks cause",
        rows=rows,
    )
