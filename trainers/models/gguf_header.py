"""The header of a GGUF file, read without numpy or torch: enough to refuse a damaged file before anything starts.

gguf's own GGUFReader takes 7 s for a tokenizer of 128,000 tokens (this 0.1 s), silently cuts texts at the end of a
truncated file, and loops over a damaged count (gguf 0.19).

Layout (github.com/ggml-org/ggml, docs/gguf.md), little-endian:
magic `GGUF` · version u32 · tensors u64 · entries u64 · the entries · the tensors' infos · padding · the tensors.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainers.errors import ModelError

VERSIONS = (2, 3)
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


@dataclass(slots=True)
class _Reader:
    """Reads a file from start to end; raises ValueError for a count or length that reaches past its end."""

    stream: BinaryIO
    size: int
    position: int = 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise ValueError(f"{what} needs {count} bytes at byte {self.position}, past the end of the file")
        self.position += count
        return self.stream.read(count)

    def number(self, letter: str, what: str) -> Any:
        (found,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))
        return found

    def text(self, what: str) -> str:
        return self.take(self.number("Q", what), what).decode()

    def value(self, what: str) -> Any:
        """Return a text or a number; arrays are skipped. Raises KeyError for an unknown type."""
        kind = self.number("I", what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            return self.number(_SCALARS[kind], what)
        inner, count = self.number("I", what), self.number("Q", what)
        if inner != _STRING:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"), what)
        else:
            # A damaged count ends where the file does, since every text has a length.
            for _ in range(count):
                self.text(what)
        return None

    def tensor(self, name: str) -> tuple[int, int, int]:
        """Return the number of a tensor's elements, their type and its offset."""
        elements = math.prod(self.number("Q", name) for _ in range(self.number("I", name)))
        return elements, self.number("I", name), self.number("Q", name)

    def named(self, count: int, what: str, value: Callable[[str], Any]) -> dict[str, Any]:
        """Return `count` values by the names in front of them."""
        found = {(name := self.text(f"the name of {what} {number}")): value(name) for number in range(count)}
        if len(found) < count or not count:
            raise ValueError(f"it has no {what}, or two of one name")
        return found


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a file's entries and the sizes of its tensors. Raises ModelError if a tensor is not in the file, or for damage."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    try:
        with file.open("rb") as stream:
            reader = _Reader(stream, file.stat().st_size)
            magic, version = reader.take(4, "the magic"), reader.number("I", "the version")
            if magic != b"GGUF" or version not in VERSIONS:
                raise ValueError(
                    f"it starts with {magic!r} and version {version}, not with GGUF and {VERSIONS}"
                )
            counts = [reader.number("Q", "a count") for _ in range(2)]
            known = reader.named(counts[1], "entry", reader.value)
            tensors = reader.named(counts[0], "tensor", reader.tensor)
        alignment = known.get("general.alignment", 32)
        if not isinstance(known.get("general.architecture"), str) or not alignment:
            raise ValueError("it names no general.architecture, or an alignment of 0")
        room = reader.size - -(-reader.position // alignment) * alignment
        for name, (elements, kind, offset) in tensors.items():
            block, block_bytes = sizes.get(kind, (0, 0))
            if not block or not elements or elements % block or offset % alignment:
                raise ValueError(f"tensor {name} has {elements} values of type {kind} at offset {offset}")
            if offset + elements // block * block_bytes > room:
                raise ValueError(f"tensor {name} at offset {offset} does not lie in the file")
    except (OSError, LookupError, ValueError, TypeError, struct.error) as error:
        raise ModelError(f"{file} is damaged or no GGUF file: {error}; fetch it again.") from error
    return known, {name: elements for name, (elements, _, _) in tensors.items()}


def architecture_numbers(file: Path) -> dict[str, Any]:
    """Return the sizes in the header, under the names of a config.json. Raises ModelError."""
    known, tensors = read_header(file)
    family = known["general.architecture"]
    found = {name: known.get(f"{family}.{ending}") for ending, name in _NUMBERS.items()}
    embeddings, hidden = tensors.get("token_embd.weight"), found["hidden_size"]
    vocabulary = embeddings // hidden if embeddings and isinstance(hidden, int) and hidden else None
    tied = "output.weight" not in tensors
    return {**found, "model_type": family, "vocab_size": vocabulary, "tie_word_embeddings": tied}
