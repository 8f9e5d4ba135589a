"""The header of a GGUF file, read without numpy or torch: enough to refuse a damaged file before anything starts.

Layout (github.com/ggml-org/ggml, docs/gguf.md), little-endian:
magic `GGUF` · version u32 · tensors u64 · entries u64 · the entries · the tensors' infos · padding · the tensors.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainers.errors import ModelError

MAGIC, VERSIONS = b"GGUF", (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# Value types of entries by their number in the file: struct's letter for each.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    elements: int
    kind: int
    offset: int


class _Reader:
    """Reads forward through a file of known size; a count or length that reaches past its end is refused."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size, self.position = stream, size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self._size - self.position:
            raise ValueError(f"{what} needs {count} bytes at byte {self.position}, past the end of the file")
        self.position += count
        return self._stream.read(count)

    def number(self, letter: str, what: str) -> int:
        found: int = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]
        return found

    def text(self, what: str) -> str:
        return self.take(self.number("Q", what), what).decode()

    def value(self, kind: int, what: str) -> Value:
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"{what} has the unknown type {kind}")
            return self.number(_SCALARS[kind], what)
        inner, count = self.number("I", what), self.number("Q", what)
        if inner == _STRING:
            # Every string takes 8 bytes at least: a count that cannot be is refused before it is walked.
            if 8 * count > self._size - self.position:
                raise ValueError(f"{what} counts {count} strings, more than the file could hold")
            for _ in range(count):
                self.text(what)
        elif inner in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"), what)
        else:
            raise ValueError(f"{what} is an array of the unknown type {inner}")
        return None


def require_sound_gguf(file: Path) -> None:
    """Raise ModelError where the header cannot be followed or names tensors that the file does not hold."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            _check(_Reader(stream, size), size)
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file} is damaged or no GGUF file: {error}; fetch it again.") from error


# Names of a config.json by the endings of a GGUF file's own.
_NUMBERS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}


def architecture_numbers(file: Path) -> dict[str, Any]:
    """What the header says of the architecture, under the names of a config.json. Raises ModelError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            known, tensors = _header(_Reader(stream, size))
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file} is damaged or no GGUF file: {error}; fetch it again.") from error
    family = str(known["general.architecture"])
    found: dict[str, Any] = {name: known.get(f"{family}.{ending}") for ending, name in _NUMBERS.items()}
    names = {tensor.name: tensor.elements for tensor in tensors}
    hidden = found["hidden_size"]
    embeddings = names.get("token_embd.weight")
    vocabulary = embeddings // hidden if embeddings and isinstance(hidden, int) and hidden else None
    tied = "output.weight" not in names
    return {**found, "model_type": family, "vocab_size": vocabulary, "tie_word_embeddings": tied}


def _check(reader: _Reader, size: int) -> None:
    known, infos = _header(reader)
    alignment = known.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment {alignment} is no power of two")
    if not infos:
        raise ValueError("it holds no tensor")
    start = -(-reader.position // alignment) * alignment
    _require_inside(infos, size - start, alignment)


def _header(reader: _Reader) -> tuple[dict[str, Value], list[_Tensor]]:
    magic = reader.take(4, "the magic")
    if magic != MAGIC:
        raise ValueError(f"it starts with {magic!r}, not with {MAGIC!r}")
    version = reader.number("I", "the version")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, and {VERSIONS} are read")
    tensors, entries = reader.number("Q", "the tensor count"), reader.number("Q", "the entry count")
    known = dict(_entries(reader, entries))
    if not isinstance(known.get("general.architecture"), str):
        raise ValueError("it names no general.architecture")
    return known, list(_tensors(reader, tensors))


def _entries(reader: _Reader, count: int) -> Iterator[tuple[str, Value]]:
    seen: set[str] = set()
    for number in range(count):
        name = _new_name(reader, f"entry {number}", seen)
        yield name, reader.value(reader.number("I", name), name)


def _tensors(reader: _Reader, count: int) -> Iterator[_Tensor]:
    seen: set[str] = set()
    for number in range(count):
        name = _new_name(reader, f"tensor {number}", seen)
        dimensions = reader.number("I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = [reader.number("Q", name) for _ in range(dimensions)]
        kind, offset = reader.number("I", name), reader.number("Q", name)
        yield _Tensor(name=name, elements=math.prod(shape), kind=kind, offset=offset)


def _new_name(reader: _Reader, what: str, seen: set[str]) -> str:
    name = reader.text(f"the name of {what}")
    if not name or name in seen:
        raise ValueError(f"{what} is called {name!r}, which is empty or taken")
    seen.add(name)
    return name


def _require_inside(tensors: list[_Tensor], room: int, alignment: int) -> None:
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    for tensor in tensors:
        if tensor.kind not in sizes:
            raise ValueError(f"tensor {tensor.name} has the unknown type {tensor.kind}")
        block, block_bytes = sizes[tensor.kind]
        if not tensor.elements or tensor.elements % block:
            raise ValueError(f"tensor {tensor.name} holds {tensor.elements} values, no multiple of {block}")
        if tensor.offset % alignment or tensor.offset + tensor.elements // block * block_bytes > room:
            raise ValueError(f"tensor {tensor.name} at offset {tensor.offset} does not lie in the file")
