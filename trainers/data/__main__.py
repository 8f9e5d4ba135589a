"""`python -m trainers.data list | show | prepare | audit | rewrite`: look at preference data, and make it."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from trainers.command import TemplateFlags, command, make_folder
from trainers.data.audit import SETS, SEVERITIES, AuditSet, Role, Tokenize, audit_sets, originals, set_row
from trainers.data.known import KNOWN, Funnel, named_set, rewrites_base, said_funnel
from trainers.data.records import Digest, Pair, as_row
from trainers.data.rewriting import Rewrite
from trainers.data.sources import (
    NamedSet,
    Reading,
    RowFlags,
    chosen_spec,
    dataset_spec,
    flags,
    has_own_test,
    iter_pairs,
    own_split,
    read_pairs,
    resolved_revision,
    row_fields,
    said_left_out,
    splits_of,
)
from trainers.errors import DataError, SpecError
from trainers.evaluate.suites import SUITES
from trainers.specs import BUILTIN, FETCHED, DatasetSpec, DrawSpec, given_name
from trainers.storage import disk_named, replace

# What a set is for, and the split that is for it.
_ROLES: dict[Role, str] = {"train": "train", "eval": "test"}
# Flags for sets without a test split.
_DIVIDES = ("test_share", "split_seed", "group_by")
_Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")]


@dataclass(frozen=True, kw_only=True)
class List:
    """List the named data sets: where each comes from, which revision, what it is."""

    def run(self) -> None:
        shown = [("name", "revision", "source", "what")]
        for spec, about in KNOWN.items():
            shown.append((spec.name, (spec.revision or "-")[:12], _source_of(spec), about))
        _print_table(shown)
        print("A hub set without a revision (-) is pinned to the hub's newest at the first fetch.")


def _print_table(lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def _source_of(spec: DatasetSpec) -> str:
    """Return where a set comes from, as it is printed."""
    if spec.source.startswith(FETCHED):
        # A mirror's address may hold a password.
        return rewrites_base().rpartition("@")[2].removeprefix("https://")
    return "built in" if spec.source.startswith(BUILTIN) else spec.source


@dataclass(frozen=True, kw_only=True)
class Show:
    """Show some pairs of a set, where it comes from, and the digest of its content."""

    data: NamedSet
    """A known name, a file, a folder or a hub id."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    split: str = "train"
    """The split to show."""
    pairs: int = 2
    """Number of pairs to show."""
    model: str | None = None
    """Folder or hub id: show pairs as its chat template renders them, with · between tokens."""
    rendering: tyro.conf.OmitArgPrefixes[TemplateFlags] = field(default_factory=TemplateFlags)

    def run(self) -> None:
        if self.pairs < 0:
            raise SpecError(f"--pairs {self.pairs}: give a number of at least 0.")
        spec = chosen_spec(self.data, self.reading)
        first: list[Pair] = []
        _read(spec, own_split(spec, self.split), first, self.pairs)
        print(f"from {_source_of(spec)}" + (f" at revision {spec.revision}" if spec.revision else ""))
        rows = (json.dumps(as_row(pair), indent=1, ensure_ascii=False) for pair in first)
        for number, text in enumerate(_as_tokens(self, self.model, first) if self.model else rows):
            print(f"\n── {number} ──\n{text}")


def _as_tokens(show: Show, model: str, pairs: Sequence[Pair]) -> Iterator[str]:
    """Yield each pair as the model reads it, its tokens apart. Raises SweepError."""
    from trainers.pairs.templates import given_template, load_tokenizer
    from trainers.pairs.tokens import tokenize_pairs

    tokenizer = load_tokenizer(model, template=given_template(show.rendering.template))
    # Limits that no text is over: what is shown is not drawn.
    draw = DrawSpec(
        max_prompt_tokens=1 << 62,
        max_response_tokens=1 << 62,
        system=show.rendering.system,
        reasoning=show.rendering.reasoning,
    )
    for tokens in tokenize_pairs(pairs, tokenizer, draw)[0] if pairs else ():
        parts = (("prompt", tokens.prompt), ("chosen", tokens.chosen), ("rejected", tokens.rejected))
        yield "\n".join(
            f"[{what}, {len(ids)} tokens{f', the first {kept} not scored' if kept else ''}] "
            + "·".join(tokenizer.decode([token]) for token in ids)
            for (what, ids), kept in zip(parts, (0, *tokens.unscored), strict=True)
        )


def _read(
    spec: DatasetSpec, split: str, first: list[Pair], most: int, file: Path | None = None
) -> dict[str, Any]:
    """Read a split, say what was read, and return it; keep its `first` pairs, and write all to `file` as jsonl."""
    digest, left_out, funnel = Digest(), list[str](), Funnel()
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(file.open("w", encoding="utf-8")) if file else None
        for pair in iter_pairs(spec, split, left_out, funnel):
            digest.add(pair)
            if len(first) < most:
                first.append(pair)
            if lines:
                lines.write(json.dumps(as_row(pair), ensure_ascii=False) + "\n")
    print(f"{spec.name}, split {split}: {digest.rows} pairs, content {digest.hexdigest()[:16]}")
    print(end=f"  {said_funnel(funnel)}\n" if funnel else "")
    print(end=said_left_out(left_out))
    return {"rows": digest.rows, "digest": digest.hexdigest(), "left_out": left_out, "funnel": funnel}


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Read a set once, with the paper's filters and draw if it has them, and write it to a folder.

    OUT/train.jsonl and test.jsonl are a data set. OUT/prepared.json has its source and revision, and of each split the
    digest, rows, how many rows were readable and had a preference (not for the paper's draws), and the bad rows.
    """

    data: NamedSet
    """A known name, a file, a folder or a hub id."""
    out: Path
    """Folder to write."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)

    def run(self) -> None:
        """Prepare the set; its splits appear together or not at all. Raises SweepError."""
        spec = chosen_spec(self.data, self.reading)
        spec = dataclasses.replace(spec, revision=resolved_revision(spec))
        names = splits_of(spec)
        if not names:
            raise DataError(f"{spec.source} has neither a {spec.train_split} nor a {spec.test_split} split.")
        record_file, source = self.out / "prepared.json", _source_of(spec)
        before = _earlier(record_file)
        known = Path(str(before.get("source"))).absolute() == Path(source).absolute()
        same = known and [*before.get("splits", ())] == [*names]
        if self.out.is_file() or (not same and any(self.out.glob("[!.]*"))):
            raise SpecError(
                f"--out {self.out} is no new folder, nor that of an earlier `prepare` of {spec.name}; give another."
            )
        make_folder(self.out)
        with tempfile.TemporaryDirectory(prefix=".", dir=self.out) as drafts, disk_named(self.out):
            files = {split: Path(drafts) / f"{split}.jsonl" for split in names}
            splits = {split: _read(spec, split, [], 0, file) for split, file in files.items()}
            record = {"name": spec.name, "source": source, "revision": spec.revision, "splits": splits}
            # First: killed after it, the same command may write the folder again.
            replace(record_file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            for file in files.values():
                file.replace(self.out / file.name)


def _earlier(record: Path) -> dict[str, Any]:
    """Return what an earlier `prepare` noted in a folder; empty where there is none or it cannot be read."""
    try:
        found = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, kw_only=True)
class AuditFlags:
    """Find what would mislead in preference data: leaks, length shortcuts, identical and cut responses."""

    data: tyro.conf.Positional[_Words] = ()
    """Sets whose train split trains and whose test split is evaluated; a file is evaluated."""
    train: _Words = ()
    """Sets that only train."""
    eval: _Words = ()
    """Sets that are only evaluated."""
    rows: tyro.conf.OmitArgPrefixes[RowFlags] = field(default_factory=RowFlags)
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="ID|PATH")] = None
    """Folder or hub id of a tokenizer: measure lengths and token overlap in its tokens too."""
    out: Path = Path("audit.json")
    """File to write everything that was measured to."""
    json: bool = False
    """Print that file instead of the tables."""

    def run(self) -> None:
        if not (self.data or self.train or self.eval):
            raise SpecError("audit: name at least one set: a folder, a file or a known name.")
        if self.out.is_dir():
            raise SpecError(f"--out {self.out} is a folder; name a file in it.")
        groups: Sequence[tuple[_Words, tuple[Role, ...]]] = (
            (self.data, ()),
            (self.train, ("train",)),
            (self.eval, ("eval",)),
        )
        given = row_fields(self.rows)
        specs = [(*_named_spec(word, given), roles) for words, roles in groups for word in words]
        if unused := [
            name for name in given if all(getattr(spec, name) != given[name] for _, spec, _ in specs)
        ]:
            raise SpecError(f"{flags(unused)}: no set here can be read so; leave it out.")
        read = [_audit_set(name, spec, role) for name, spec, roles in specs for role in roles or _roles(spec)]
        names = [item.name for item in read]
        if twice := sorted({name.rpartition("/")[0] for name in names if names.count(name) > 1}):
            raise SpecError(f"two sets are called {', '.join(twice)}; give them apart with NAME=PATH.")
        # The originals of a rewriting are looked for in all that was read.
        candidates = [pair for item in read for pair in item.pairs]
        sets = [
            dataclasses.replace(item, rewrites=originals(item.pairs, candidates, declared=False))
            for item in read
        ]
        audited = audit_sets(
            [item for item in sets if item.role == "train"],
            [item for item in sets if item.role == "eval"],
            tokenize=None if self.tokenizer is None else _tokenizer(self.tokenizer),
        )
        said = json.dumps(audited.as_json(), indent=1, ensure_ascii=False)
        replace(self.out, said + "\n")
        if self.json:
            print(said)
            return
        _print_table([SETS, *map(set_row, audited.sets)])
        for finding in audited.findings:
            print(f"{finding.severity}: {finding.said.removeprefix('data: ')}")
        found = [finding.severity for finding in audited.findings]
        counts = ", ".join(f"{found.count(severity)} {severity}" for severity in SEVERITIES)
        print(f"{counts}; everything measured: {self.out}")


def _named_spec(word: str, given: Mapping[str, Any]) -> tuple[str, DatasetSpec]:
    """Return the name and the set of NAME=SOURCE or SOURCE. Raises SpecError, DataError."""
    name, equals, source = word.partition("=")
    if not equals or name in SUITES or Path(word).expanduser().exists():
        name, source = "", word
    spec = dataset_spec(source)
    # The flags are for your own sets, not the named ones.
    if not spec.selection and named_set(spec.name) != spec:
        divides = () if has_own_test(spec) else _DIVIDES
        taken = {name: value for name, value in given.items() if name in divides or name not in _DIVIDES}
        spec = dataclasses.replace(spec, **taken)
    return given_name("NAME", name) if name else spec.name, dataclasses.replace(spec, skip_bad_rows=True)


def _roles(spec: DatasetSpec) -> tuple[Role, ...]:
    if spec.train_split == spec.test_split or (Path(spec.source).is_file() and not spec.test_share):
        return ("eval",)
    splits = splits_of(spec)
    # If none is there, reading the test split raises an error that names what was expected.
    return tuple(role for role, own in _ROLES.items() if own_split(spec, own) in splits) or ("eval",)


def _audit_set(name: str, spec: DatasetSpec, role: Role) -> AuditSet:
    unreadable: list[str] = []
    pairs = read_pairs(spec, own_split(spec, _ROLES[role]), unreadable)
    return AuditSet(name=f"{name}/{_ROLES[role]}", role=role, pairs=pairs, unreadable=unreadable)


def _tokenizer(location: str) -> Tokenize:
    from trainers.pairs.templates import load_tokenizer

    loaded: Any = load_tokenizer(location)
    return lambda text: loaded(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Look at preference data, prepare it for training, audit it, rewrite it."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Union[List, Show, Prepare, Annotated[AuditFlags, tyro.conf.subcommand("audit")], Rewrite]
    ]


def run(arguments: Data) -> None:
    arguments.command.run()


if __name__ == "__main__":
    command(Data, run, "trainers.data", models=False)
