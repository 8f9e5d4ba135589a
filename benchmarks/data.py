"""The model and the pairs of a measurement: drawn once by the parent, read by every worker from one folder."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.turns import Job, Kind, Task
from trainers.data.records import Pair, read_written_pairs, write_pairs
from trainers.data.sources import read_pairs
from trainers.errors import DataError
from trainers.models.loading import convert_gguf
from trainers.pairs.tokens import TokenPair, read_tokens, tokenize_pairs, write_tokens
from trainers.specs import DatasetSpec, DrawSpec

MAX_PROMPT_TOKENS = 512
MAX_RESPONSE_TOKENS = 512
_CACHE = Path("~/.cache/rmsweep-benchmarks").expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Pairs as tokens, and the records they came from, in the same order."""

    pairs: list[TokenPair]
    records: list[Pair]


def ready_model(folder: Path, cache: Path = _CACHE) -> Path:
    """A Hugging Face folder in fp32: `folder`, or what its GGUF file was converted to (once, kept in `cache`)."""
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return folder.resolve()
    converted = cache / f"{files[0].stem}-{files[0].stat().st_size}"
    if not converted.is_dir():
        unfinished = converted.with_name(converted.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        convert_gguf(files[0], unfinished)
        unfinished.rename(converted)
    return converted.resolve()


def draw(model: Path, data: Path, *, split: str, count: int, seed: int) -> Drawn:
    """`count` random pairs of `split` that fit the token limits. Raises DataError where it has fewer."""
    records = read_pairs(DatasetSpec(name=data.name, source=str(data)), split)
    limits = DrawSpec(
        max_pairs=count,
        seed=seed,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )
    pairs, _ = tokenize_pairs(records, AutoTokenizer.from_pretrained(model), limits)
    if len(pairs) < count:
        raise DataError(f"{data}, split {split}: only {len(pairs)} pairs fit the limits, {count} are needed.")
    return Drawn(pairs=pairs, records=[records[pair.index] for pair in pairs])


def save(drawn: Drawn, folder: Path) -> None:
    """Write what `load` reads."""
    write_tokens(drawn.pairs, folder / "tokens.arrow")
    write_pairs(drawn.records, folder / "records.jsonl")


def load(folder: Path) -> Drawn:
    """What `save` wrote."""
    return Drawn(
        pairs=list(read_tokens(folder / "tokens.arrow")),
        records=list(read_written_pairs(folder / "records.jsonl")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A model's folder, and the folder of `count` pairs that `save` wrote."""

    model: Path
    folder: Path
    count: int

    def job(self, contender: str, task: Task, kind: Kind) -> Job:
        """The job of a worker on these inputs, with a thread for every core, or as OMP_NUM_THREADS says."""
        return Job(
            contender=contender,
            task=task,
            kind=kind,
            model=str(self.model),
            folder=str(self.folder),
            threads=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        )


@contextlib.contextmanager
def prepared(model: Path, data: Path, *, split: str, count: int, seed: int) -> Iterator[Inputs]:
    """The model made ready and the pairs drawn, in a folder that lasts as long as the block."""
    location = ready_model(model)
    drawn = draw(location, data, split=split, count=count, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        save(drawn, Path(folder))
        yield Inputs(model=location, folder=Path(folder), count=count)


def chat_rows(records: list[Pair]) -> list[dict[str, Any]]:
    """Records as TRL wants them: prompt, chosen and rejected as chat messages."""

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return [
        {
            "prompt": [message.as_dict() for message in record.prompt],
            "chosen": answer(record.chosen),
            "rejected": answer(record.rejected),
        }
        for record in records
    ]


def parameter_bytes(model: Any) -> int:
    """Bytes of a model's weights, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def pad_id_of(model: str) -> int:
    """The id that pads rows, from the model's config."""
    pad = json.loads((Path(model) / "config.json").read_text()).get("pad_token_id")
    return 0 if pad is None else int(pad)
