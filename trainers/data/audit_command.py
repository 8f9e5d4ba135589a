"""`python -m trainers.data audit NAME|PATH …`: what in preference data would mislead, as a table and audit.json."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from trainers.command import command, dataset_spec
from trainers.data import sources
from trainers.data.audit import Audit as Audited
from trainers.data.audit import AuditSet, audit_sets
from trainers.data.audit.rewrites import originals
from trainers.data.audit.sets import Role, Tokenize
from trainers.data.choosing import Rows, row_fields
from trainers.data.named import named_set
from trainers.data.records import Pair
from trainers.disk import replace
from trainers.errors import DataError, SpecError
from trainers.specs import DatasetSpec, given_name

_SPLIT: dict[Role, str] = {"train": "train", "eval": "test"}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Find what in preference data would mislead: leaks, length shortcuts, identical and cut responses."""

    data: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")]] = ()
    """Sets whose train split trains and whose test split is evaluated; a file is evaluated."""
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")] = ()
    """Sets that only train."""
    eval: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")] = ()
    """Sets that are only evaluated."""
    rows: tyro.conf.OmitArgPrefixes[Rows] = field(default_factory=Rows)
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="ID|PATH")] = None
    """Folder or hub id: lengths and token overlap in its tokens, too."""
    response_limit: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Responses of at least this many tokens (words without --tokenizer) were probably cut there."""
    out: Path = Path("audit.json")
    """Where everything that was measured is written."""
    json: bool = False
    """Print it as JSON in the place of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """Pairs of one split of a named set; `unreadable` says of each row that is no pair what is wrong with it."""

    name: str
    role: Role
    pairs: Sequence[Pair]
    unreadable: Sequence[str]


def run_audit(arguments: Audit) -> None:
    """Read, audit, write `out`, print. Raises SweepError."""
    if not (arguments.data or arguments.train or arguments.eval):
        raise SpecError("audit: name at least one set: a folder, a file or a known name.")
    if arguments.response_limit is not None and arguments.response_limit < 1:
        raise SpecError(f"--response-limit {arguments.response_limit}: give at least 1.")
    if arguments.out.is_dir():
        raise SpecError(f"--out {arguments.out} is a folder; name a file in it.")
    read = _read_all(arguments)
    audited = audit_sets(
        _sets(read, "train"),
        _sets(read, "eval"),
        tokenize=_tokenize(arguments.tokenizer),
        response_limit=arguments.response_limit,
    )
    said = json.dumps(audited.as_json(), indent=1, ensure_ascii=False)
    replace(arguments.out, said + "\n")
    if arguments.json:
        print(said)
        return
    _print(audited, arguments.out)


def _read_all(arguments: Audit) -> list[_Read]:
    words: list[tuple[str, tuple[Role, ...]]] = [
        (word, _roles(word, arguments.rows)) for word in arguments.data
    ]
    words += [(word, ("train",)) for word in arguments.train]
    words += [(word, ("eval",)) for word in arguments.eval]
    read = [_read(word, role, arguments.rows) for word, roles in words for role in roles]
    names = [(item.name, item.role) for item in read]
    twice = sorted({name for name, role in names if names.count((name, role)) > 1})
    if twice:
        raise SpecError(f"two sets are called {', '.join(twice)}; give them apart with NAME=PATH.")
    return read


def _named(word: str) -> tuple[str | None, str]:
    """NAME=SOURCE as the two, unless a path of that spelling is there."""
    name, equals, source = word.partition("=")
    named = equals and not Path(word).expanduser().exists()
    return (given_name("NAME", name), source) if named else (None, word)


def _roles(word: str, rows: Rows) -> tuple[Role, ...]:
    path = Path(_named(word)[1]).expanduser()
    if rows.test_share or not path.exists():
        return ("train", "eval")
    if path.is_file():
        return ("eval",)
    spec = DatasetSpec(name="data", source=str(path))
    found = tuple(role for role, split in _SPLIT.items() if sources.has_split(spec, split))
    # Reading the split that is missing says what was expected.
    return found or ("eval",)


def _read(word: str, role: Role, rows: Rows) -> _Read:
    name, source = _named(word)
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().exists():
        raise DataError(f"{source}: no such file or folder.")
    spec, unreadable = dataset_spec(source), list[str]()
    # The catalog's rows are read one way.
    if named_set(spec.name) != spec:
        spec = dataclasses.replace(spec, **row_fields(rows))
    # A known set may call its splits otherwise.
    split = {"train": spec.train_split, "eval": spec.test_split}[role]
    pairs = sources.read_pairs(dataclasses.replace(spec, skip_bad_rows=True), split, unreadable)
    return _Read(name=name or spec.name, role=role, pairs=pairs, unreadable=unreadable)


def _sets(read: Iterable[_Read], role: Role) -> list[AuditSet]:
    """The sets of a role; their originals are looked for in all that was read."""
    everything = list(read)
    candidates = [pair for item in everything for pair in item.pairs]
    return [
        AuditSet(
            name=f"{item.name}/{_SPLIT[item.role]}",
            role=role,
            pairs=item.pairs,
            unreadable=item.unreadable,
            rewrites=originals(item.pairs, candidates, declared=False),
        )
        for item in everything
        if item.role == role
    ]


def _tokenize(tokenizer: str | None) -> Tokenize | None:
    if tokenizer is None:
        return None
    from trainers.templates import load_tokenizer

    loaded: Any = load_tokenizer(tokenizer)

    def tokenize(text: str) -> Sequence[int]:
        ids: list[int] = loaded(text, add_special_tokens=False)["input_ids"]
        return ids

    return tokenize


def _print(audited: Audited, out: Path) -> None:
    from rich.console import Console

    from trainers.data.audit.tables import findings_table, sets_table

    console = Console()
    console.print(sets_table(audited))
    console.print(findings_table(audited))
    counts = {
        severity: sum(finding.severity == severity for finding in audited.findings)
        for severity in ("error", "warn", "info")
    }
    said = ", ".join(f"{count} {severity}" for severity, count in counts.items())
    console.print(f"{said}; everything measured: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command(Audit, run_audit, "trainers.data.audit_command")
