"""The header of a GGUF file, read without numpy or torch: enough to refuse a damaged file before anything starts.

gguf's own GGUFReader takes 7 s for a tokenizer of 128,000 tokens (this 0.1 s), silently cuts texts at the end of a
truncated file, and loops over a damaged count (gguf 0.19).

Layout (github.com/ggml-org/ggml, docs/gguf.md), little-endian:
magic `GGUF` · version u32 · tensors u64 · entries u64 · the entries · the tensors' infos · padding · the tensors.
"""

import contextlib
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
# Names of a config.json by the endings of a GGUF file's own.
_NUMBERS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    elements: int
    kind: int
    offset: int


class _Reader:
    """Reads a file from start to end; raises ValueError for a count or length that reaches past its end."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self.size, self.position = stream, size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise ValueError(f"{what} needs {count} bytes at byte {self.position}, past the end of the file")
        self.position += count
        return self._stream.read(count)

    def number(self, letter: str, what: str) -> int:
        found: int = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]
        return found

    def text(self, what: str) -> str:
        return self.take(self.number("Q", what), what).decode()

    def value(self, kind: int, what: str) -> str | int | None:
        """Return a text or a number; arrays are skipped."""
        if kind == _STRING:
            return self.text(what)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise ValueError(f"{what} has the unknown type {kind}")
        inner, count = self.number("I", what), self.number("Q", what)
        if inner in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"), what)
        elif inner != _STRING:
            raise ValueError(f"{what} is an array of the unknown type {inner}")
        # Every string takes 8 bytes at least, so an impossible count is refused before the loop.
        elif 8 * count > self.size - self.position:
            raise ValueError(f"{what} counts {count} strings, more than the file could hold")
        else:
            for _ in range(count):
                self.text(what)
        return None

    def named(self, count: int, what: str) -> Iterator[str]:
        """Yield `count` names; the caller reads what follows each."""
        seen: set[str] = set()
        for number in range(count):
            name = self.text(f"the name of {what} {number}")
            if not name or name in seen:
                raise ValueError(f"{what} {number} is called {name!r}, which is empty or taken")
            seen.add(name)
            yield name

    def tensor(self, name: str) -> _Tensor:
        dimensions = self.number("I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        elements = math.prod(self.number("Q", name) for _ in range(dimensions))
        return _Tensor(elements=elements, kind=self.number("I", name), offset=self.number("Q", name))


@contextlib.contextmanager
def _header(file: Path) -> Iterator[tuple[dict[str, Any], dict[str, _Tensor], _Reader]]:
    """Yield a file's entries, its tensors, and the reader after them. Raises ModelError, also for the block's errors."""
    try:
        with file.open("rb") as stream:
            reader = _Reader(stream, file.stat().st_size)
            magic = reader.take(4, "the magic")
            if magic != MAGIC:
                raise ValueError(f"it starts with {magic!r}, not with {MAGIC!r}")
            version = reader.number("I", "the version")
            if version not in VERSIONS:
                raise ValueError(f"its version is {version}, and {VERSIONS} are read")
            tensors, entries = reader.number("Q", "the tensor count"), reader.number("Q", "the entry count")
            known = {
                name: reader.value(reader.number("I", name), name) for name in reader.named(entries, "entry")
            }
            if not isinstance(known.get("general.architecture"), str):
                raise ValueError("it names no general.architecture")
            yield known, {name: reader.tensor(name) for name in reader.named(tensors, "tensor")}, reader
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file} is damaged or no GGUF file: {error}; fetch it again.") from error


def require_sound_gguf(file: Path) -> None:
    """Raise ModelError if the header is damaged or names tensors that are not in the file."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    with _header(file) as (known, tensors, reader):
        alignment = known.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment {alignment} is no power of two")
        if not tensors:
            raise ValueError("it holds no tensor")
        room = reader.size - -(-reader.position // alignment) * alignment
        for name, tensor in tensors.items():
            if tensor.kind not in sizes:
                raise ValueError(f"tensor {name} has the unknown type {tensor.kind}")
            block, block_bytes = sizes[tensor.kind]
            if not tensor.elements or tensor.elements % block:
                raise ValueError(f"tensor {name} holds {tensor.elements} values, no multiple of {block}")
            if tensor.offset % alignment or tensor.offset + tensor.elements // block * block_bytes > room:
                raise ValueError(f"tensor {name} at offset {tensor.offset} does not lie in the file")


def architecture_numbers(file: Path) -> dict[str, Any]:
    """Return the sizes in the header, under the names of a config.json. Raises ModelError."""
    with _header(file) as (known, tensors, _):
        family = known["general.architecture"]
        found = {name: known.get(f"{family}.{ending}") for ending, name in _NUMBERS.items()}
        embeddings, hidden = tensors.get("token_embd.weight"), found["hidden_size"]
        vocabulary = (
            embeddings.elements // hidden if embeddings and isinstance(hidden, int) and hidden else None
        )
        tied = "output.weight" not in tensors
        return {**found, "model_type": family, "vocab_size": vocabulary, "tie_word_embeddings": tied}
