"""`python -m trainers.data list`: the data sets that are known by name."""

import json
from dataclasses import dataclass

from trainers.data.named import DATASETS, FACTS, REWRITES, rewrites_url
from trainers.specs import BUILTIN, FETCHED, PERSONA, DatasetSpec


@dataclass(frozen=True, kw_only=True)
class List:
    """Every named data set: where it comes from, which revision, how many pairs."""

    json: bool = False
    """As a list of objects."""


def run_list(arguments: List) -> None:
    """Print the table."""
    rows = [_row(spec) for spec in DATASETS]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    shown = [("name", "train", "test", "revision", "source", "what")]
    shown += [
        (
            str(row["name"]),
            _count(row["train"]),
            _count(row["test"]),
            str(row["revision"] or "-")[:12],
            str(row["source"]),
            str(row["about"]),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in shown) for column in range(5)]
    for line in shown:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[5]]))
    print("A hub set with revision - is taken as the hub has it at the first fetch, and remembered.")


def _row(spec: DatasetSpec) -> dict[str, object]:
    facts = FACTS[spec.name]
    return {
        "name": spec.name,
        "source": source_of(spec),
        "revision": spec.revision,
        "train": facts.train,
        "test": facts.test,
        "rewriting_of": spec.rewriting_of,
        "about": facts.about,
    }


def source_of(spec: DatasetSpec) -> str:
    """Where a set comes from, for people."""
    if spec.source.startswith(BUILTIN):
        return "built in"
    if spec.source.startswith(FETCHED):
        return (
            rewrites_url(spec.name, "test").partition(f"/{REWRITES[spec.name]}")[0].removeprefix("https://")
        )
    return spec.source.removeprefix(PERSONA)


def _count(pairs: object) -> str:
    return "?" if pairs is None else str(pairs or "-")
