"""`python -m trainers.data list | show | prepare | audit | rewrite`: preference data, looked at and made."""

import dataclasses
import itertools
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from trainers.command import command
from trainers.data.audit import Audit, AuditSet, Role, audit_sets, originals
from trainers.data.audit.findings import FINDINGS, SETS, set_row
from trainers.data.known import KNOWN, SUBSET_SEED, Funnel, KnownSet, named_set, rewrites_base, said_funnel
from trainers.data.records import Digest, Message, Pair, as_row, as_turns
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
    has_split,
    iter_pairs,
    own_split,
    read_pairs,
    resolved_revision,
    row_fields,
    splits_of,
)
from trainers.errors import DataError, SpecError, TrialFailed
from trainers.specs import BUILTIN, FETCHED, DatasetSpec, DrawSpec, Reasoning, System, given_name
from trainers.storage import disk_named, replace

Named = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME|PATH")]]
_Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")]


@dataclass(frozen=True, kw_only=True)
class List:
    """List the named data sets: where each comes from, which revision, how many pairs."""

    json: bool = False
    """Print a list of objects."""

    def run(self) -> None:
        """Print the table."""
        rows = [_listed(known) for known in KNOWN]
        if self.json:
            print(json.dumps(rows, indent=1))
            return
        shown = [("name", "train", "test", "revision", "source", "what")]
        for row in rows:
            counts = ["?" if row[split] is None else str(row[split] or "-") for split in ("train", "test")]
            revision = str(row["revision"] or "-")[:12]
            shown.append((row["name"], *counts, revision, row["source"], row["about"]))
        widths = [max(len(line[column]) for line in shown) for column in range(5)]
        for line in shown:
            print(
                "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[5]])
            )
        print("A hub set with revision - is taken as the hub has it at the first fetch, and remembered.")


def _listed(known: KnownSet) -> dict[str, Any]:
    spec = known.spec
    return {
        "name": spec.name,
        "source": _source_of(spec),
        "revision": spec.revision,
        "train": known.train,
        "test": known.test,
        "rewriting_of": spec.rewriting_of,
        "about": known.about,
    }


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
    template: str | None = None
    """Chat template in the place of the model's own: the name of one that its tokenizer has, or a Jinja file."""
    system: System = "fold"
    """A system turn where the template takes none: fold it into the first user turn, drop it, or refuse the row."""
    reasoning: Reasoning = "score"
    """Reasoning in a response: score it like the rest, or drop it."""
    storage: Path | None = None
    """A sweep's storage: also say which revision of the set it took, and which content that was."""
    json: bool = False
    """Print one object."""

    def run(self) -> None:
        """Print pairs of the set. Raises SweepError."""
        if self.pairs < 0:
            raise SpecError(f"--pairs {self.pairs}: give a number of at least 0.")
        spec = chosen_spec(self.data, self.reading)
        left_out: list[str] = []
        digest, first, funnel = Digest(), [], Funnel()
        for pair in iter_pairs(spec, own_split(spec, self.split), left_out, funnel):
            digest.add(pair)
            if digest.rows <= self.pairs:
                first.append(pair)
        facts: dict[str, Any] = {
            "name": spec.name,
            "source": _source_of(spec),
            "revision": spec.revision,
            "split": self.split,
            "rows": digest.rows,
            "digest": digest.hexdigest(),
            "left_out": left_out,
            "funnel": funnel,
            "remembered": [] if self.storage is None else remembered(self.storage, spec.source),
        }
        if self.json:
            print(json.dumps({**facts, "pairs": [as_row(pair) for pair in first]}, ensure_ascii=False))
            return
        print(f"{spec.name}, split {self.split}: {digest.rows} pairs, content {facts['digest'][:16]}")
        print(f"from {facts['source']}" + (f" at revision {spec.revision}" if spec.revision else ""))
        for record in facts["remembered"]:
            print(
                f"in {self.storage}: split {record['split']} at revision {record['revision']}, "
                f"content {record['digest'][:16]}, {record['rows']} pairs"
            )
        _say_what_was_left(funnel, left_out)
        rendered = map(_text, first) if self.model is None else _as_tokens(self, self.model, first)
        for number, text in enumerate(rendered):
            print(f"\n── {number} ──\n{text}")


def _as_tokens(show: Show, model: str, pairs: Sequence[Pair]) -> Iterator[str]:
    """Yield each pair as the model reads it, its tokens apart. Raises SweepError."""
    from trainers.pairs.templates import given_template, load_tokenizer
    from trainers.pairs.tokens import tokenize_pairs

    tokenizer = load_tokenizer(model, template=given_template(show.template))
    # Limits that no text is over: what is shown is not drawn.
    draw = DrawSpec(
        max_prompt_tokens=1 << 62,
        max_response_tokens=1 << 62,
        system=show.system,
        reasoning=show.reasoning,
    )
    for tokens in tokenize_pairs(pairs, tokenizer, draw)[0] if pairs else ():
        parts = (("prompt", tokens.prompt), ("chosen", tokens.chosen), ("rejected", tokens.rejected))
        yield "\n".join(
            f"[{what}, {len(ids)} tokens] {'·'.join(tokenizer.decode([token]) for token in ids)}"
            for what, ids in parts
        )


def _say_what_was_left(funnel: Funnel, left_out: list[str]) -> None:
    if funnel:
        print(f"  {said_funnel(funnel)}")
    if left_out:
        print(f"{len(left_out)} bad rows left out:")
    for line in left_out[:20]:
        print(f"  {line}")
    if len(left_out) > 20:
        print(f"  and {len(left_out) - 20} more")


def remembered(storage: Path, source: str) -> list[dict[str, Any]]:
    """Return what a sweep's store noted of a source when it fetched it; nothing where it never did."""
    records = [json.loads(file.read_text()) for file in sorted((storage / "sources").glob("*.json"))]
    names = ("set", "split", "revision", "digest", "rows")
    return [{name: record[name] for name in names} for record in records if record.get("source") == source]


def _text(pair: Pair) -> str:
    parts = [("tools", pair.tools)] if pair.tools else []
    parts += [(turn.role, _said(turn)) for turn in pair.prompt]
    for what, turns in zip(("chosen", "rejected"), pair.responses, strict=True):
        parts += [(what if len(turns) == 1 else f"{what}: {turn.role}", _said(turn)) for turn in turns]
    return "\n".join(f"[{what}] {_short(text)}" for what, text in parts)


def _said(turn: Message) -> str:
    return " ".join(filter(None, turn[1:]))


def _short(text: str) -> str:
    lines = [part for line in text.splitlines() for part in (textwrap.wrap(line, 100) or [""])]
    return "\n".join(lines[:6]) + (" …" if len(lines) > 6 else "")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Read a set once, with the paper's filters and draw where it has them, and keep it in a folder.

    OUT/train.parquet and test.parquet are a data set by themselves: prompt, chosen and rejected as messages.
    OUT/prepared.json has source, revision, and of each split digest, rows, what each filter left and the bad
    rows that were left out.
    """

    data: Named
    """A known name, a file, a folder or a hub id."""
    out: Path
    """Folder to write."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    splits: tuple[str, ...] = ()
    """Splits to read (default: those that the set has)."""
    json: bool = False
    """Print prepared.json."""

    def run(self) -> None:
        """Prepare the set; its splits appear together or not at all. Raises SweepError."""
        spec = chosen_spec(self.data, self.reading)
        spec = dataclasses.replace(spec, revision=resolved_revision(spec))
        out = self.out
        out.mkdir(parents=True, exist_ok=True)
        names = self.splits or splits_of(spec)
        if not names:
            raise DataError(f"{spec.source} has neither a {spec.train_split} nor a {spec.test_split} split.")
        with tempfile.TemporaryDirectory(dir=out) as drafts, disk_named(out):
            splits = {split: _keep(spec, split, Path(drafts) / f"{split}.parquet") for split in names}
            for split in names:
                (Path(drafts) / f"{split}.parquet").replace(out / f"{split}.parquet")
        record: dict[str, Any] = {
            "name": spec.name,
            "source": _source_of(spec),
            "revision": spec.revision,
            "splits": splits,
        }
        replace(out / "prepared.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if self.json:
            print(json.dumps(record, ensure_ascii=False))
            return
        for split, facts in splits.items():
            print(f"{spec.name}, split {split}: {facts['rows']} pairs, content {facts['digest'][:16]}")
            _say_what_was_left(facts["funnel"], facts["left_out"])


def _keep(spec: DatasetSpec, split: str, file: Path) -> dict[str, Any]:
    """Write the split as it is read. Returns its digest, rows, bad rows and funnel."""
    import pyarrow as pa
    from pyarrow import parquet

    turns = pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", "fields")]))
    columns = [(name, turns) for name in ("prompt", "chosen", "rejected")]
    schema = pa.schema([*columns, ("orig_chosen", pa.string()), ("tools", pa.string())])
    digest, left_out, funnel = Digest(), list[str](), Funnel()
    with parquet.ParquetWriter(file, schema) as writer:
        pairs = iter_pairs(spec, split, left_out, funnel)
        while batch := list(itertools.islice(pairs, 1024)):
            for pair in batch:
                digest.add(pair)
            rows = [{**as_turns(pair), "orig_chosen": pair.original_chosen} for pair in batch]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return {"digest": digest.hexdigest(), "rows": digest.rows, "left_out": left_out, "funnel": funnel}


@dataclass(frozen=True, kw_only=True)
class AuditFlags:
    """Find what in preference data would mislead: leaks, length shortcuts, identical and cut responses."""

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
        wanted = [(word, role) for word in self.data for role in _roles(word, self.rows)]
        wanted += [(word, "train") for word in self.train] + [(word, "eval") for word in self.eval]
        read = [_split(word, role, self.rows) for word, role in wanted]
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


def _name_and_source(word: str) -> tuple[str | None, str]:
    """Divide NAME=SOURCE, unless a path of that spelling is there."""
    name, equals, source = word.partition("=")
    named = equals and not Path(word).expanduser().exists()
    return (given_name("NAME", name), source) if named else (None, word)


def _roles(word: str, rows: RowFlags) -> tuple[Role, ...]:
    path = Path(_name_and_source(word)[1]).expanduser()
    both: tuple[Role, ...] = ("train", "eval")
    if rows.test_share or not path.exists():
        return both
    if path.is_file():
        return ("eval",)
    spec = DatasetSpec(name="data", source=str(path))
    # Reading the test split that is missing too says what was expected.
    return tuple(r for r in both if has_split(spec, "train" if r == "train" else "test")) or ("eval",)


def _split(word: str, role: Role, rows: RowFlags) -> AuditSet:
    name, source = _name_and_source(word)
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().exists():
        raise DataError(f"{source}: no such file or folder.")
    spec, unreadable = dataset_spec(source), list[str]()
    # The flags say how your own sets are read, not the named ones.
    if named_set(spec.name) != spec:
        spec = dataclasses.replace(spec, **row_fields(rows))
    split = spec.train_split if role == "train" else spec.test_split
    pairs = read_pairs(dataclasses.replace(spec, skip_bad_rows=True), split, unreadable)
    own = "train" if role == "train" else "test"
    return AuditSet(name=f"{name or spec.name}/{own}", role=role, pairs=pairs, unreadable=unreadable)


def _tokenizer(location: str) -> Callable[[str], Sequence[int]]:
    from trainers.pairs.templates import load_tokenizer

    loaded: Any = load_tokenizer(location)

    def tokenize(text: str) -> Sequence[int]:
        ids: list[int] = loaded(text, add_special_tokens=False)["input_ids"]
        return ids

    return tokenize


def _print_audit(audited: Audit, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    sets = Table(title="sets", title_justify="left")
    for number, name in enumerate(SETS):
        sets.add_column(name, overflow="fold", justify="left" if number < 2 else "right")
    for item in audited.sets:
        sets.add_row(*set_row(item))
    findings = Table(title="findings", title_justify="left", show_lines=True)
    for name in FINDINGS:
        findings.add_column(name, overflow="fold")
    for finding in audited.findings:
        findings.add_row(*finding.row, style={"error": "red", "warn": "yellow"}.get(finding.severity, ""))
    console.print(sets, findings)
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
    """Say what it would take, and ask nothing."""

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
        _say_what_was_left([], left_out)
        pairs = sampled(rows, self.sample, self.sample_seed)
        texts = responses_of(pairs)
        out.parent.mkdir(parents=True, exist_ok=True)
        hygiene, failures = (out.with_name(f"{out.name}.{what}.jsonl") for what in ("hygiene", "failures"))
        if self.rules is not None:
            outcome = rewrite_by_rules(texts, self.rules)
            written = write_rewritten(out, pairs, outcome, hygiene=hygiene, failures=failures)
            print(f"{written}, by the rules {self.rules}, in {out}")
            return
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
        outcome = rewrite_texts(texts, task, asking, journal)
        print(f"paid: {journal.spent(asking)}")
        written = write_rewritten(out, pairs, outcome, hygiene=hygiene, failures=failures)
        if written.kept:
            print(f"{written}, in {out}")
        if written.failures:
            stopped = ""
            if outcome.stopped:
                stopped = f"stopped: {outcome.stopped}; the same command with a higher cap goes on. "
            raise TrialFailed(
                f"{stopped}{written.said_failures()}; all are in {failures}. Run the same command to ask again where a "
                "request failed, or with more --attempts."
            )


Subcommand = Union[
    Annotated[List, tyro.conf.subcommand("list")],
    Annotated[Show, tyro.conf.subcommand("show")],
    Annotated[Prepare, tyro.conf.subcommand("prepare")],
    Annotated[AuditFlags, tyro.conf.subcommand("audit")],
    Annotated[Rewrite, tyro.conf.subcommand("rewrite")],
]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Look at preference data, prepare it for training, audit it, rewrite it."""

    command: tyro.conf.OmitSubcommandPrefixes[Subcommand]


def run(arguments: Data) -> None:
    """Run the subcommand. Raises SweepError."""
    arguments.command.run()


if __name__ == "__main__":
    command(Data, run, "trainers.data", models=False)
