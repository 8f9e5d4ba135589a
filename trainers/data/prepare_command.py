"""`python -m trainers.data prepare NAME|PATH --out FOLDER`: a set read once, kept as parquet, and as tokens if asked.

FOLDER/train.parquet, test.parquet     prompt as messages, chosen, rejected: a data set by itself. Where a split has
                                       responses of several turns, tool calls or tools: all as messages, what a turn
                                       has beside role and content as JSON in its `fields`, and the tools as JSON
FOLDER/prepared.json                   source, revision, and of each split digest, rows, funnel, bad rows left out
FOLDER/tokens/<key>/train.arrow        tokens, one folder for each tokenizer and limits, memory-mapped when read
"""

import dataclasses
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import tyro
from pyarrow import parquet

from trainers.command import ties, unknown
from trainers.data.choosing import Reading, chosen_spec
from trainers.data.list_command import source_of
from trainers.data.records import Digest, Pair, as_row, as_turns, is_plain, read_written_pairs, write_pairs
from trainers.data.selections import Funnel
from trainers.data.show_command import say_left_out
from trainers.data.sources import iter_pairs, resolved_revision, splits_of
from trainers.disk import disk_named, replace
from trainers.errors import DataError
from trainers.specs import DatasetSpec, DrawSpec

PREPARED = "prepared.json"

_ROWS_AT_ONCE = 1024
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SCHEMA = pa.schema(
    [("prompt", _MESSAGES), ("chosen", pa.string()), ("rejected", pa.string()), ("orig_chosen", pa.string())]
)
_WITH_FIELDS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("fields", pa.string())]))
_SCHEMA_OF_TURNS = pa.schema(
    [(name, _WITH_FIELDS) for name in ("prompt", "chosen", "rejected")]
    + [("orig_chosen", pa.string()), ("tools", pa.string())]
)


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Read a set once, with the paper's filters and draw where it has them, and keep it in a folder."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME|PATH")]]
    """A known name, a file, a folder or a hub id."""
    out: Path
    """Folder for train.parquet, test.parquet, prepared.json and tokens/."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    splits: tuple[str, ...] = ()
    """Which splits (default: those that the set has)."""
    tokenizer: str | None = None
    """Folder or hub id of a model: tokenise the pairs with its tokenizer and chat template."""
    limits: tyro.conf.OmitArgPrefixes[DrawSpec] = field(default_factory=DrawSpec)
    json: bool = False
    """Print prepared.json."""


def run_prepare(arguments: Prepare) -> None:
    """Prepare the set. Raises SweepError; the splits appear together or not at all."""
    spec = chosen_spec(arguments.data, arguments.reading)
    spec = dataclasses.replace(spec, revision=resolved_revision(spec))
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = arguments.splits or splits_of(spec)
    if not names:
        raise DataError(f"{spec.source} has neither a {spec.train_split} nor a {spec.test_split} split.")
    with tempfile.TemporaryDirectory(dir=arguments.out) as drafts, disk_named(arguments.out):
        splits = {split: _keep(spec, split, Path(drafts) / f"{split}.parquet") for split in names}
        for split in names:
            (Path(drafts) / f"{split}.parquet").replace(arguments.out / f"{split}.parquet")
    record: dict[str, Any] = {
        "name": spec.name,
        "source": source_of(spec),
        "revision": spec.revision,
        "splits": splits,
    }
    replace(arguments.out / PREPARED, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if arguments.tokenizer is not None:
        record["tokens"] = _tokenize(arguments, splits)
    if arguments.json:
        print(json.dumps(record, ensure_ascii=False))
        return
    for split, facts in splits.items():
        print(f"{spec.name}, split {split}: {facts['rows']} pairs, content {facts['digest'][:16]}")
        if len(facts["funnel"]) > 1:
            print("  " + " → ".join(f"{count:,} {what}" for what, count in facts["funnel"]))
        say_left_out(facts["left_out"])
    if "tokens" in record:
        _say_tokens(record["tokens"], str(arguments.tokenizer))


def _say_tokens(tokens: dict[str, Any], tokenizer: str) -> None:
    from trainers.pairs import read_counts

    for split, facts in tokens.items():
        print(
            f"tokens of {split}: {facts['pairs']} pairs, {facts['too_long']} over the limits, in {facts['file']}"
        )
        if facts["identical"]:
            print(f"  {ties(facts['identical'], facts['pairs'], tokenizer)}")
        if (counts := read_counts(facts)) and counts.many_unknown:
            print(f"  {unknown(counts, tokenizer)}")


def _keep(spec: DatasetSpec, split: str, file: Path) -> dict[str, Any]:
    """Write the split as it is read, and say who it is; anew as turns from the first pair on that plain text would cut."""
    for schema in (_SCHEMA, _SCHEMA_OF_TURNS):
        digest, left_out, funnel, whole = Digest(), list[str](), Funnel(), True
        with parquet.ParquetWriter(file, schema) as writer:
            pairs = iter_pairs(spec, split, left_out, funnel)
            while whole and (batch := list(itertools.islice(pairs, _ROWS_AT_ONCE))):
                for pair in batch:
                    digest.add(pair)
                whole = schema is _SCHEMA_OF_TURNS or all(map(is_plain, batch))
                row_of = as_row if schema is _SCHEMA else as_turns
                rows = [{**row_of(pair), "orig_chosen": pair.original_chosen} for pair in batch]
                if whole:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        if whole:
            break
    return {"digest": digest.hexdigest(), "rows": digest.rows, "left_out": left_out, "funnel": funnel}


def _tokenize(arguments: Prepare, splits: dict[str, Any]) -> dict[str, Any]:
    """Tokens of each split, made where they are not there yet."""
    from trainers.templates import load_tokenizer

    tokenizer = load_tokenizer(str(arguments.tokenizer))
    made = {}
    for split, facts in splits.items():
        key = _tokens_key(facts["digest"], tokenizer, arguments.limits)
        file = arguments.out / "tokens" / key / f"{split}.arrow"
        noted = file.with_suffix(".json")
        if not noted.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            spec = DatasetSpec(name="prepared", source=str(arguments.out))
            replace(noted, json.dumps(_tokens(iter_pairs(spec, split), tokenizer, arguments.limits, file)))
        made[split] = {**json.loads(noted.read_text()), "file": str(file)}
    return made


def _tokens(pairs: Iterable[Pair], tokenizer: Any, limits: DrawSpec, file: Path) -> dict[str, int]:
    from trainers.pairs import Counts, iter_tokens, write_tokens

    counts = Counts()
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, disk_named(file):
        # A draw asks for rows in any order.
        write_pairs(pairs, Path(folder) / "pairs.jsonl")
        rows = read_written_pairs(Path(folder) / "pairs.jsonl")
        draft = Path(folder) / file.name
        count = write_tokens(iter_tokens(rows, tokenizer, limits, "response", counts), draft)
        draft.replace(file)
    return {"pairs": count, **dataclasses.asdict(counts)}


def _tokens_key(digest: str, tokenizer: Any, limits: DrawSpec) -> str:
    """Everything that the tokens depend on: the rows, the tokenizer with its template, the draw."""
    known = [
        digest,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        dataclasses.asdict(limits),
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
