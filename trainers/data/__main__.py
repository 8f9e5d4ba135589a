"""`python -m trainers.data list | show | prepare | audit | rewrite`: look at preference data, and make it."""

import dataclasses
import functools
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO, Union

import tyro

from trainers.command import TemplateFlags, command
from trainers.data.audit import FINDINGS, SETS, Audit, AuditSet, Role, audit_sets, originals, set_row
from trainers.data.known import KNOWN, SUBSET_SEED, Funnel, named_set, rewrites_base, said_funnel
from trainers.data.records import Digest, Pair, as_row
from trainers.data.rewriting import (
    PARAPHRASE,
    Asking,
    Journal,
    estimate,
    missing_texts,
    responses_of,
    rewrite_by_rules,
    rewrite_texts,
    sampled,
    task_for,
    write_rewritten,
)
from trainers.data.sources import (
    Reading,
    RowFlags,
    chosen_spec,
    dataset_spec,
    iter_pairs,
    own_split,
    read_pairs,
    resolved_revision,
    row_fields,
    split_off,
    splits_of,
)
from trainers.errors import DataError, SpecError, TrialFailed
from trainers.evaluate.suites import SUITES
from trainers.specs import BUILTIN, FETCHED, DatasetSpec, DrawSpec, given_name
from trainers.storage import disk_named, replace

Named = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME|PATH")]]
# What a set is for, and the split that is for it.
_ROLES: dict[Role, str] = {"train": "train", "eval": "test"}
_Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")]


@dataclass(frozen=True, kw_only=True)
class List:
    """List the named data sets: where each comes from, which revision, how many pairs."""

    json: bool = False
    """Print a list of objects."""

    def run(self) -> None:
        """Print the table."""
        rows = [
            {
                "name": known.spec.name,
                "train": known.train,
                "test": known.test,
                "revision": known.spec.revision,
                "source": _source_of(known.spec),
                "rewriting_of": known.spec.rewriting_of,
                "about": known.about,
            }
            for known in KNOWN
        ]
        if self.json:
            print(json.dumps(rows, indent=1))
            return
        shown = [("name", "train", "test", "revision", "source", "what")]
        for row in rows:
            counts = ("?" if row[split] is None else str(row[split] or "-") for split in ("train", "test"))
            shown.append(
                (row["name"], *counts, (row["revision"] or "-")[:12], row["source"], row["about"])  # type: ignore
            )
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        for line in shown:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
        print("A hub set without a revision (-) is pinned to the hub's newest at the first fetch.")


def _source_of(spec: DatasetSpec) -> str:
    """Return where a set comes from, as it is printed."""
    if spec.source.startswith(BUILTIN):
        return "built in"
    if spec.source.startswith(FETCHED):
        return rewrites_base().removeprefix("https://")
    return spec.source


@dataclass(frozen=True, kw_only=True)
class Show:
    """Show some pairs of a set, where it comes from, and the digest of its content."""

    data: Named
    """A known name, a file, a folder or a hub id."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    split: str = "train"
    """The split to show."""
    pairs: int = 2
    """Number of pairs to show."""
    model: str | None = None
    """Folder or hub id: show pairs as its chat template renders them, with · between tokens."""
    rendering: tyro.conf.OmitArgPrefixes[TemplateFlags] = field(default_factory=TemplateFlags)
    storage: Path | None = None
    """A sweep's storage: also print the revision and the content of the set that it used."""
    json: bool = False
    """Print one object."""

    def run(self) -> None:
        """Print pairs of the set. Raises SweepError."""
        if self.pairs < 0:
            raise SpecError(f"--pairs {self.pairs}: give a number of at least 0.")
        spec = chosen_spec(self.data, self.reading)
        split = own_split(spec, self.split)
        first: list[Pair] = []
        read = _read(spec, split, lambda pair: first.append(pair) if len(first) < self.pairs else None)
        facts: dict[str, Any] = {
            "name": spec.name,
            "source": _source_of(spec),
            "revision": spec.revision,
            "split": split,
            **read,
            "remembered": [] if self.storage is None else remembered(self.storage, spec.source),
        }
        if self.json:
            print(json.dumps({**facts, "pairs": [as_row(pair) for pair in first]}, ensure_ascii=False))
            return
        _say_split(spec, split, read)
        print(f"from {facts['source']}" + (f" at revision {spec.revision}" if spec.revision else ""))
        for record in facts["remembered"]:
            print(
                f"in {self.storage}: split {record['split']} at revision {record['revision']}, "
                f"content {record['digest'][:16]}, {record['rows']} pairs"
            )
        rendered = map(_text, first) if self.model is None else _as_tokens(self, self.model, first)
        for number, text in enumerate(rendered):
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


def _read(spec: DatasetSpec, split: str, keep: Callable[[Pair], Any]) -> dict[str, Any]:
    """Read a split pair by pair. Return its rows, digest, bad rows, and how many rows each step left."""
    digest, left_out, funnel = Digest(), list[str](), Funnel()
    for pair in iter_pairs(spec, split, left_out, funnel):
        digest.add(pair)
        keep(pair)
    return {"rows": digest.rows, "digest": digest.hexdigest(), "left_out": left_out, "funnel": funnel}


def _say_split(spec: DatasetSpec, split: str, read: dict[str, Any]) -> None:
    print(f"{spec.name}, split {split}: {read['rows']} pairs, content {read['digest'][:16]}")
    if read["funnel"]:
        print(f"  {said_funnel(read['funnel'])}")
    _say_left_out(read["left_out"])


def _say_left_out(left_out: list[str]) -> None:
    if left_out:
        more = [f"and {len(left_out) - 20} more"] if len(left_out) > 20 else []
        print("\n  ".join([f"{len(left_out)} bad rows left out:", *left_out[:20], *more]))


def remembered(storage: Path, source: str) -> list[dict[str, Any]]:
    """Return the records that a sweep's store wrote when it fetched a source."""
    records = [json.loads(file.read_text()) for file in sorted((storage / "sources").glob("*.json"))]
    names = ("set", "split", "revision", "digest", "rows")
    return [{name: record[name] for name in names} for record in records if record.get("source") == source]


def _text(pair: Pair) -> str:
    parts = [("tools", pair.tools)] if pair.tools else []
    for what, turns in (("", pair.prompt), *zip(("chosen", "rejected"), pair.responses, strict=True)):
        for turn in turns:
            alone = what if len(turns) == 1 else f"{what}: {turn.role}"
            parts.append((alone if what else turn.role, " ".join(filter(None, turn[1:]))))
    return "\n".join(f"[{what}] {_short(text)}" for what, text in parts)


def _short(text: str) -> str:
    lines = [part for line in text.splitlines() for part in (textwrap.wrap(line, 100) or [""])]
    return "\n".join(lines[:6]) + (" …" if len(lines) > 6 else "")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Read a set once, with the paper's filters and draw if it has them, and write it to a folder.

    OUT/train.jsonl and test.jsonl are a data set. OUT/prepared.json has its source and revision, and the digest, rows,
    steps of the filters and bad rows of each split.
    """

    data: Named
    """A known name, a file, a folder or a hub id."""
    out: Path
    """Folder to write."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    splits: tuple[str, ...] = ()
    """Splits to read (default: those that the set has)."""

    def run(self) -> None:
        """Prepare the set; its splits appear together or not at all. Raises SweepError."""
        spec = chosen_spec(self.data, self.reading)
        spec = dataclasses.replace(spec, revision=resolved_revision(spec))
        out, splits = self.out, dict[str, Any]()
        out.mkdir(parents=True, exist_ok=True)
        names = self.splits or splits_of(spec)
        if not names:
            raise DataError(f"{spec.source} has neither a {spec.train_split} nor a {spec.test_split} split.")
        with tempfile.TemporaryDirectory(dir=out) as drafts, disk_named(out):
            files = {split: Path(drafts) / f"{split}.jsonl" for split in names}
            for split, file in files.items():
                with file.open("w", encoding="utf-8") as lines:
                    splits[split] = _read(spec, split, functools.partial(_write, lines))
            for file in files.values():
                file.replace(out / file.name)
        record: dict[str, Any] = {
            "name": spec.name,
            "source": _source_of(spec),
            "revision": spec.revision,
            "splits": splits,
        }
        replace(out / "prepared.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        for split, read in splits.items():
            _say_split(spec, split, read)


def _write(lines: TextIO, pair: Pair) -> None:
    lines.write(json.dumps(as_row(pair), ensure_ascii=False) + "\n")


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
        """Read, audit, write `out`, print. Raises SweepError."""
        if not (self.data or self.train or self.eval):
            raise SpecError("audit: name at least one set: a folder, a file or a known name.")
        if self.out.is_dir():
            raise SpecError(f"--out {self.out} is a folder; name a file in it.")
        groups: Sequence[tuple[_Words, tuple[Role, ...]]] = (
            (self.data, ()),
            (self.train, ("train",)),
            (self.eval, ("eval",)),
        )
        specs = [(*_named_spec(word, self.rows), roles) for words, roles in groups for word in words]
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
        else:
            _print_audit(audited, self.out)


def _named_spec(word: str, rows: RowFlags) -> tuple[str, DatasetSpec]:
    """Return the name and the set of NAME=SOURCE or SOURCE. Raises SpecError, DataError."""
    name, equals, source = word.partition("=")
    if not equals or name in SUITES or Path(word).expanduser().exists():
        name, source = "", word
    if source.startswith(("/", ".", "~")) and not Path(split_off(source)[0]).expanduser().exists():
        raise DataError(f"{source}: no such file or folder.")
    spec = dataset_spec(source)
    # The flags are for your own sets, not the named ones.
    if not spec.selection and named_set(spec.name) != spec:
        spec = dataclasses.replace(spec, **row_fields(rows))
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


def _tokenizer(location: str) -> Callable[[str], Sequence[int]]:
    from trainers.pairs.templates import load_tokenizer

    loaded: Any = load_tokenizer(location)
    return lambda text: loaded(text, add_special_tokens=False)["input_ids"]


def _print_audit(audited: Audit, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    colours = {"error": "red", "warn": "yellow"}
    for title, names, rows in (
        ("sets", SETS, [(set_row(item), "") for item in audited.sets]),
        ("findings", FINDINGS, [(item, colours.get(item.severity, "")) for item in audited.findings]),
    ):
        table = Table(title=title, title_justify="left", show_lines=title == "findings")
        for number, name in enumerate(names):
            table.add_column(
                name, overflow="fold", justify="right" if names is SETS and number > 1 else "left"
            )
        for row, style in rows:
            table.add_row(*row, style=style)
        console.print(table)
    found = [finding.severity for finding in audited.findings]
    counts = ", ".join(f"{found.count(severity)} {severity}" for severity in ("error", "warn", "info"))
    console.print(f"{counts}; everything measured: {out}", highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Rewrite the responses of a set by a model behind an OpenAI-compatible endpoint, or by rule.

    Beside OUT (prompt, chosen, rejected, orig_chosen, orig_rejected, orig_index) stand OUT.journal.jsonl with
    every answer that was paid for, from which the same command goes on; OUT.hygiene.jsonl with overlap, chrF,
    length ratio and language of every response; and OUT.failures.jsonl with the responses that have no usable
    answer, and why.
    """

    data: Named
    """A known name, a file, a folder or a hub id."""
    out: Path
    """File to write, .jsonl."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    split: str = "test"
    """The split to rewrite."""
    into: str = PARAPHRASE
    """paraphrase, or a language: french, spanish, german, …"""
    asking: tyro.conf.OmitArgPrefixes[Asking] = field(default_factory=Asking)
    rules: str | None = None
    """Exchange words and turns of phrase by rule instead of asking a model: english or tiny_world."""
    prompt: Path | None = None
    """File with your own prompt, with {response} where the text goes."""
    language: str | None = None
    """Language code that an answer must have, where --into does not say it."""
    sample: int | None = None
    """Rewrite this many pairs, drawn as in the paper, in the set's order."""
    sample_seed: int = SUBSET_SEED
    """Seed of that draw."""
    estimate: bool = False
    """Print the estimated cost and ask nothing."""

    def run(self) -> None:
        """Rewrite, or go on. Raises SweepError; TrialFailed where responses are left without a usable answer."""
        asking, out = self.asking, self.out
        if self.rules is None:
            asking.require_valid()
        elif asking.endpoint or asking.model:
            raise SpecError("give --endpoint URL with --model NAME, or --rules NAME, not both.")
        task = task_for(self.into, self.prompt, self.language)
        if out.suffix != ".jsonl":
            raise SpecError(f"--out {out}: name a .jsonl file.")
        spec = chosen_spec(self.data, self.reading)
        left_out: list[str] = []
        rows = read_pairs(spec, own_split(spec, self.split), left_out)
        _say_left_out(left_out)
        pairs = sampled(rows, self.sample, self.sample_seed)
        texts = responses_of(pairs)
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.rules is not None:
            outcome, by = rewrite_by_rules(texts, self.rules), f", by the rules {self.rules}"
        else:
            journal = Journal(out.with_name(f"{out.name}.journal.jsonl"))
            missing = missing_texts(texts, task, asking, journal)
            wanted, already = estimate(missing, task, asking), journal.spent(asking)
            print(f"{len(missing)} responses to rewrite, about {wanted}; paid before: {already}")
            if asking.max_cost is not None and already.cost + wanted.cost > asking.max_cost:
                raise SpecError(
                    f"about {wanted.cost:.2f} is needed and {already.cost:.2f} was paid before, over --max-cost "
                    f"{asking.max_cost:.2f}; raise it, or rewrite fewer pairs with --sample."
                )
            if self.estimate:
                return
            outcome, by = rewrite_texts(texts, task, asking, journal), ""
            print(f"paid: {journal.spent(asking)}")
        hygiene, failures = (out.with_name(f"{out.name}.{what}.jsonl") for what in ("hygiene", "failures"))
        written = write_rewritten(out, pairs, outcome, hygiene=hygiene, failures=failures)
        if written.kept:
            print(f"{written}{by}, in {out}")
        if written.failures:
            stopped = f"stopped: {outcome.stopped}; the same command with a higher cap goes on. "
            raise TrialFailed(
                f"{stopped if outcome.stopped else ''}{written.said_failures()}; all are in {failures}. Run the same "
                "command to ask again where a request failed, or with more --attempts."
            )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Look at preference data, prepare it for training, audit it, rewrite it."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Union[List, Show, Prepare, Annotated[AuditFlags, tyro.conf.subcommand("audit")], Rewrite]
    ]


def run(arguments: Data) -> None:
    """Run the subcommand. Raises SweepError."""
    arguments.command.run()


if __name__ == "__main__":
    command(Data, run, "trainers.data", models=False)
