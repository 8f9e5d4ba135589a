"""Tokenised pairs in a file: written in a stream, memory-mapped when read, each pair made when it is asked for."""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
from pyarrow import parquet

from trainers.pairs import TokenPair

_PAIRS_OF_A_BATCH = 1024
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("index", pa.int64()), ("prompt", _IDS), ("chosen", _IDS), ("rejected", _IDS)])


def write_tokens(tokens: Iterable[TokenPair], file: Path) -> int:
    """Write pairs as an Arrow file: index, prompt, chosen, rejected. Returns how many there were."""
    count, rest = 0, iter(tokens)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while group := list(itertools.islice(rest, _PAIRS_OF_A_BATCH)):
            columns = [
                pa.array([getattr(pair, column.name) for pair in group], column.type) for column in _SCHEMA
            ]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            count += len(group)
    return count


class TokenFile(Sequence[TokenPair]):
    """The pairs that `write_tokens` wrote."""

    def __init__(self, file: Path) -> None:
        self.file = file
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in batches))
        self._columns = [_arrays(batch) for batch in batches]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> TokenPair: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenPair]: ...
    def __getitem__(self, place: int | slice) -> TokenPair | list[TokenPair]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        batch = bisect.bisect_right(self._ends, number)
        row = number - (self._ends[batch - 1] if batch else 0)
        index, lists = self._columns[batch]
        prompt, chosen, rejected = (ids[ends[row] : ends[row + 1]].tolist() for ends, ids in lists)
        return TokenPair(index=int(index[row]), prompt=prompt, chosen=chosen, rejected=rejected)

    def mean_tokens(self) -> dict[str, float]:
        """Mean lengths of prompts, chosen and rejected responses, without reading a token."""
        sums = [
            sum(int(lists[place][0][-1] - lists[place][0][0]) for _, lists in self._columns)
            for place in range(3)
        ]
        return {
            name: total / len(self)
            for name, total in zip(("prompt", "chosen", "rejected"), sums, strict=True)
        }

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        return type(self), (self.file,)


def _arrays(batch: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """A batch as views of the mapped file: the indices, and (ends, ids) of each column of ids."""
    lists = [batch.column(name) for name in ("prompt", "chosen", "rejected")]
    return batch.column("index").to_numpy(), [
        (column.offsets.to_numpy(), column.values.to_numpy()) for column in lists
    ]


def read_tokens(file: Path) -> Sequence[TokenPair]:
    """The pairs in a file of `write_tokens`; of its older form, parquet beside it, where it is not there."""
    if file.is_file():
        return TokenFile(file)
    return [TokenPair(**row) for row in parquet.read_table(file.with_suffix(".parquet")).to_pylist()]
