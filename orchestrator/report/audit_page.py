"""The audit of a sweep's data in its report: report/audit.json, and two tables in summary.md.

Beside the findings stand the accuracies that length and leaks cannot lend: per training set, evaluation set and reward
type the mean over trials that learned.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from orchestrator.report import audit as audits
from orchestrator.report.results import TrialResult
from orchestrator.report.tables import Column, Table
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration
from trainers.data.audit import Audit, Finding, token_findings
from trainers.data.audit.rules import share
from trainers.data.audit.tables import FINDINGS, SETS, findings_rows, markdown, sets_rows
from trainers.disk import replace
from trainers.specs import clean_name

Named = tuple[str, str]
CONTROLLED_HEADER = (
    *("trained on", "evaluated on", "reward", "accuracy", "length-controlled"),
    *("leak-free", "pairs", "leak-free pairs", "longer wins", "trainings"),
)


def audit_sweep(declaration: Declaration, store: Store) -> Audit:
    """The audit of the rows that a sweep trains and is evaluated on; sets whose rows are not in the store are left out."""
    train = _unique((trial.train_set, trial.train_digest) for trial in declaration.trials)
    evaluated = _unique(
        (item.dataset, item.dataset_digest) for trial in declaration.trials for item in trial.evaluations
    )
    sets = [audits.set_audit(store, f"{name}/train", digest, "train") for name, digest in train]
    sets += [
        audits.set_audit(store, f"{name}/test", digest, "eval", _originals(declaration, (name, digest)))
        for name, digest in evaluated
    ]
    between = [
        audits.overlap(store, (f"{source[0]}/train", source[1]), (f"{item[0]}/test", item[1]))
        for source in train
        for item in _evaluated_with(declaration, source)
    ]
    return Audit(
        sets=tuple(item for item in sets if item is not None),
        between=tuple(item for item in between if item is not None),
        tokens=tuple(_token_findings(declaration, store)),
    )


def _token_findings(declaration: Declaration, store: Store) -> Iterator[Finding]:
    """What was found in the sets as models read them: once for all models of which it is the same."""
    # Tokenising is no business of planning.
    from trainers.pairs import read_counts

    models: dict[tuple[str, str], list[str]] = {}
    for trial in declaration.trials:
        prepared = [(f"{item.dataset}/test", item.prepared) for item in trial.evaluations]
        for place in ((f"{trial.train_set}/train", trial.prepared), *prepared):
            models.setdefault(place, []).append(trial.model)
    found: dict[Finding, list[str]] = {}
    for (name, key), readers in models.items():
        # A damaged manifest is said where its stage is made again.
        manifest = store.sound_manifest("prepare", key)
        info = manifest["info"] if manifest else {}
        if (counts := read_counts(info)) is not None:
            for finding in token_findings(name, counts, info["pairs"]):
                found.setdefault(finding, []).extend(readers)
    for finding, readers in found.items():
        yield dataclasses.replace(
            finding, where=f"{finding.where}, read by {', '.join(dict.fromkeys(readers))}"
        )


def audit_section(audit: Audit, results: Sequence[TrialResult], folder: Path) -> str:
    """Write audit.json into the report's folder; the section for summary.md, "" where there is nothing to say."""
    lines: list[str] = []
    rows = controlled_rows(results)
    if rows:
        lines += [
            *("", "## Accuracy without length and leaks", ""),
            "Means over trials that learned. Length-controlled: matched strata of the length difference; leak-free: pairs",
            "that the training split does not hold; longer wins: what length alone reaches, in tokens. See docs/audit.md.",
            *("", markdown(CONTROLLED_HEADER, rows)),
        ]
    if audit.sets:
        replace(folder / "audit.json", json.dumps(audit.as_json(), indent=1, ensure_ascii=False) + "\n")
        lines += ["", "## Audit of the data", "", markdown(SETS, sets_rows(audit.sets))]
        lines += ["", markdown(FINDINGS, findings_rows(audit)) if audit.findings else "No findings."]
    return "\n".join(lines) + "\n" if lines else ""


def audit_tables(audit: Audit, results: Sequence[TrialResult]) -> tuple[Table, ...]:
    """The same for the page: controlled accuracies, sets and findings; those with no row are left out."""
    found = (
        _table(
            "controlled",
            "Accuracy without length and leaks",
            "Means over trials that learned. Length-controlled: matched strata of the length difference; leak-free: "
            "pairs that the training split does not hold; longer wins: what length alone reaches, in tokens.",
            CONTROLLED_HEADER,
            controlled_rows(results),
        ),
        _table("audit_sets", "Sets", "Lengths in characters and words.", SETS, sets_rows(audit.sets)),
        _table("audit_findings", "Findings", "The worst first.", FINDINGS, findings_rows(audit)),
    )
    return tuple(table for table in found if table.rows)


def _table(name: str, title: str, note: str, header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    columns = tuple(Column(name=clean_name(item), title=item) for item in header)
    return Table(name=name, title=title, note=note, columns=columns, rows=tuple(rows))


def say_audit(declaration: Declaration, store: Store, console: Console) -> None:
    """Name what is wrong with the data while nothing has been spent on it; the report has it all."""
    audit = audit_sweep(declaration, store)
    for finding in audit.findings:
        if finding.severity == "error":
            console.print(finding.said, style="yellow", markup=False, highlight=False, soft_wrap=True)


def controlled_rows(results: Sequence[TrialResult]) -> list[tuple[str, ...]]:
    """One line per training set, evaluation set and reward type of which a trial learned."""
    cells: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for result in results:
        for item in result.final if result.learned else ():
            cell = (result.record.train_set, item.dataset, result.record.reward)
            cells.setdefault(cell, []).append(item.metrics)
    order = sorted(cells, key=lambda cell: [_place(cells, cell, depth) for depth in range(3)])
    return [(*cell, *_means(cells[cell])) for cell in order]


def _place(cells: Iterable[tuple[str, str, str]], cell: tuple[str, str, str], depth: int) -> int:
    """Where the name at `depth` of a cell comes first, so that tables keep the sweep's order."""
    return list(dict.fromkeys(item[depth] for item in cells)).index(cell[depth])


def _means(metrics: Sequence[dict[str, float]]) -> Iterator[str]:
    for name in ("accuracy", "accuracy_length_controlled", "accuracy_leak_free"):
        values = [item[name] for item in metrics if name in item]
        # A mean over some of them could not be held against the plain one.
        yield share(statistics.fmean(values)) if len(values) == len(metrics) else "–"
    for name in ("n", "n_leak_free"):
        counts = [item[name] for item in metrics if name in item]
        yield f"{min(counts):.0f}" if counts else "–"
    yield share(statistics.fmean(item["longer_wins"] for item in metrics))
    yield str(len(metrics))


def _evaluated_with(declaration: Declaration, train: Named) -> list[Named]:
    return _unique(
        (item.dataset, item.dataset_digest)
        for trial in declaration.trials
        if (trial.train_set, trial.train_digest) == train
        for item in trial.evaluations
    )


def _originals(declaration: Declaration, evaluated: Named) -> list[str]:
    """Digests of the splits whose responses an evaluation set rewrites; none where no trial says that it does."""
    found: list[str] = []
    for trial in declaration.trials:
        shifted = {
            (item.dataset, item.dataset_digest)
            for item in trial.evaluations
            if item.category == "token-level shift"
        }
        if evaluated in shifted:
            found.append(trial.train_digest)
            found += [item.dataset_digest for item in trial.evaluations if item.category == "in-distribution"]
    return sorted(set(found))


def _unique(values: Iterable[Named]) -> list[Named]:
    return list(dict.fromkeys(values))
