"""Two hundred and more ways to spoil the inputs of a sweep, the same in every run: (what, flags) of each."""

import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.model_files import CONFIG, write_gguf, write_model

Case = tuple[str, list[str]]
ROWS = [{"prompt": f"why {i}?", "chosen": f"because {i}", "rejected": f"no idea {i}"} for i in range(8)]
GIGANTIC = 2**62


def all_cases(folder: Path) -> Iterator[Case]:
    """Every case; its files are written into `folder`."""
    for kind, make in (
        ("parquet", parquet_files),
        ("jsonl", jsonl_files),
        ("arrow", arrow_files),
        ("saved", saved_folders),
    ):
        for number, (what, path) in enumerate(make(folder / kind)):
            yield f"{kind} {number}: {what}", ["--train-sets", f"mine={path}"]
    for kind, make in (("gguf", gguf_files), ("model", model_folders)):
        for number, (what, path) in enumerate(make(folder / kind)):
            yield f"{kind} {number}: {what}", ["--models", f"mine={path}"]
    for words in flags():
        yield f"flags {' '.join(words)[:60]!r}", words


def _written(folder: Path, suffix: str, contents: dict[str, bytes]) -> Iterator[tuple[str, Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (what, content) in enumerate(contents.items()):
        file = folder / f"{number}{suffix}"
        file.write_bytes(content)
        yield what, file


def _truncated(whole: bytes, count: int, seed: int) -> dict[str, bytes]:
    draw = random.Random(seed)
    return {f"cut at {at}": whole[:at] for at in sorted(draw.sample(range(1, len(whole) - 1), count))}


def _flipped(whole: bytes, first: int, last: int, count: int, seed: int) -> dict[str, bytes]:
    draw = random.Random(seed)
    flipped = {}
    for at in sorted(draw.sample(range(first, last), count)):
        changed = bytearray(whole)
        changed[at] ^= 0x80
        flipped[f"byte {at} flipped"] = bytes(changed)
    return flipped


def _tables() -> dict[str, pa.Table]:
    """Tables that are sound as files and no preference data."""
    good = pa.Table.from_pylist(ROWS)
    texts = good.column("chosen")

    def replaced(values: pa.Array | pa.ChunkedArray) -> pa.Table:
        return good.set_column(1, "chosen", values)

    invalid = pa.StringArray.from_buffers(
        2, pa.py_buffer(struct.pack("<3i", 0, 2, 4)), pa.py_buffer(b"\xff\xfeok")
    )
    return {
        "no chosen": good.drop_columns(["chosen"]),
        "no rejected": good.drop_columns(["rejected"]),
        "no prompt": good.drop_columns(["prompt"]),
        "other names": good.rename_columns(["question", "good", "bad"]),
        "a column twice": good.append_column("chosen", texts),
        "no rows": good.slice(0, 0),
        "no columns": pa.table({}),
        "numbers": replaced(pa.array(range(8))),
        "nan": replaced(pa.array([float("nan")] * 8)),
        "infinities": replaced(pa.array([float("inf")] * 8)),
        "nulls": replaced(pa.array([None] * 8, pa.string())),
        "one null": replaced(pa.array([None, *texts.to_pylist()[1:]])),
        "empty text": replaced(pa.array([""] * 8)),
        "bytes": replaced(pa.array([b"x"] * 8)),
        "truths": replaced(pa.array([True] * 8)),
        "structs": replaced(pa.array([{"role": "user"}] * 8)),
        "turns without text": replaced(pa.array([[{"role": "user", "content": None}]] * 8)),
        "empty lists": replaced(pa.array([[]] * 8, pa.list_(pa.string()))),
        "lists of numbers": replaced(pa.array([[1, 2]] * 8)),
        "times": replaced(pa.array([GIGANTIC] * 8, pa.timestamp("us"))),
        "invalid utf-8": pa.table({"prompt": ["a", "b"], "chosen": invalid, "rejected": ["a", "b"]}),
    }


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet_files(folder: Path) -> Iterator[tuple[str, Path]]:
    whole = _parquet(pa.Table.from_pylist(ROWS))
    footer = struct.unpack("<I", whole[-8:-4])[0]
    contents = {what: _parquet(table) for what, table in _tables().items() if what != "no columns"}
    contents |= _truncated(whole, 8, seed=1)
    # The schema and the row counts stand at the footer's beginning.
    contents |= _flipped(whole, len(whole) - 8 - footer, len(whole) - 8 - footer + 60, 8, seed=2)
    contents |= {
        "empty": b"",
        "only magic": b"PAR1",
        "zeros": bytes(len(whole)),
        "no magic": b"XXXX" + whole[4:],
        "other end": whole[:-4] + b"PARX",
        "huge footer": whole[:-8] + struct.pack("<I", 2**31) + b"PAR1",
        "jsonl": json.dumps(ROWS[0]).encode(),
    }
    return _written(folder, ".parquet", contents)


def arrow_files(folder: Path) -> Iterator[tuple[str, Path]]:
    whole = _arrow(pa.Table.from_pylist(ROWS))
    contents = {what: _arrow(table) for what, table in _tables().items()}
    contents |= _truncated(whole[: len(whole) // 2], 6, seed=3)
    contents |= {"empty": b"", "zeros": bytes(64), "parquet": _parquet(pa.Table.from_pylist(ROWS))}
    contents["huge message"] = whole[:4] + struct.pack("<i", 2**31 - 1) + whole[8:]
    contents["negative message"] = whole[:4] + struct.pack("<i", -5) + whole[8:]
    return _written(folder, ".arrow", contents)


def jsonl_files(folder: Path) -> Iterator[tuple[str, Path]]:
    lines = [json.dumps(row) for row in ROWS]
    whole = "\n".join(lines).encode()

    def one(text: str) -> bytes:
        """The good rows with one other line among them."""
        return "\n".join([*lines[:3], text, *lines[3:]]).encode(errors="surrogatepass")

    def row(**changes: Any) -> bytes:
        return one(json.dumps({**ROWS[0], **changes}))

    contents = {f"cut in line {at}": whole[: whole.find(b"\n", 60 * at) + 30] for at in range(5)}
    contents |= {
        "empty": b"",
        "blank lines": b"\n\n  \n",
        "nul bytes": bytes(100),
        "a nul in a text": whole.replace(b"because 3", b"beca\0se 3"),
        "invalid utf-8": whole.replace(b"because 3", b"beca\xffse 3"),
        "utf-16": whole.decode().encode("utf-16"),
        "latin-1": whole.replace(b"because 3", "bécause".encode("latin-1")),
        "one list": json.dumps(ROWS).encode(),
        "a number": one("7"),
        "a string": one('"chosen"'),
        "null": one("null"),
        "a list": one("[]"),
        "an empty object": one("{}"),
        "not json": one("prompt: why"),
        "single quotes": one(str(ROWS[0])),
        "two objects in a line": one(lines[0] + lines[1]),
        "trailing comma": one(lines[0][:-1] + ",}"),
        "half a surrogate": one('{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}'),
        "half a surrogate in a step": one('{"prompt": "a", "chosen": ["\\udfff"], "rejected": "b"}'),
        "half a surrogate in an original": one(lines[0][:-1] + ', "orig_chosen": "\\ud800"}'),
        "a name twice": one(lines[0][:-1] + ', "chosen": "again"}'),
        "nested too deep": one("[" * 100_000),
        "a number of many digits": one('{"prompt": "a", "chosen": "b", "rejected": ' + "9" * 5000 + "}"),
        "nan": row(chosen=float("nan")),
        "infinity": row(chosen=float("-inf")),
        "no chosen": one('{"prompt": "a", "rejected": "b"}'),
        "no prompt": one('{"chosen": "a", "rejected": "b"}'),
        "number for a prompt": row(prompt=3),
        "null for rejected": row(rejected=None),
        "truth for rejected": row(rejected=True),
        "empty chosen": row(chosen=""),
        "blank chosen": row(chosen=" \n\t"),
        "object for chosen": row(chosen={"role": "user", "content": "x"}),
        "empty list for chosen": row(chosen=[]),
        "numbers for chosen": row(chosen=[1, 2]),
        "mixed list for chosen": row(chosen=["a", {"role": "user", "content": "x"}]),
        "turn without role": row(chosen=[{"content": "x"}]),
        "turn with a number": row(chosen=[{"role": "assistant", "content": 4}]),
        "turns that differ": row(
            chosen=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            rejected=[{"role": "user", "content": "z"}, {"role": "assistant", "content": "y"}],
        ),
        "other names": json.dumps({"question": "a", "good": "b", "bad": "c"}).encode(),
    }
    return _written(folder, ".jsonl", contents)


def saved_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """As datasets.save_to_disk writes them, each without one of its shards."""
    whole = _arrow(pa.Table.from_pylist(ROWS))
    for count in range(2, 18):
        split = folder / str(count) / "train"
        split.mkdir(parents=True)
        (split / "state.json").write_text("{}")
        for number in range(count - 1):
            (split / f"data-{number:05}-of-{count:05}.arrow").write_bytes(whole)
        yield f"{count - 1} of {count} shards", split.parent


def gguf_files(folder: Path) -> Iterator[tuple[str, Path]]:
    folder.mkdir()
    whole = write_gguf(folder / "good").read_bytes()
    infos = whole.find(b"token_embd.weight") - 8
    after_name = infos + 8 + len("token_embd.weight")

    def put(at: int, letter: str, value: float) -> bytes:
        packed = struct.pack(f"<{letter}", value)
        return whole[:at] + packed + whole[at + len(packed) :]

    key = whole.find(b"general.architecture")
    value_type = key + len("general.architecture")
    contents = _truncated(whole, 12, seed=4)
    contents |= {
        "empty": b"",
        "zeros": bytes(len(whole)),
        "other magic": b"GGML" + whole[4:],
        "version 0": put(4, "I", 0),
        "version 99": put(4, "I", 99),
        "version of the other byte order": put(4, "I", 3 << 24),
        "no tensors": put(8, "Q", 0),
        "one tensor less": put(8, "Q", 1)[:infos] + b"",
        "one tensor more": put(8, "Q", 3),
        "gigantic tensor count": put(8, "Q", GIGANTIC),
        "no entries": put(16, "Q", 0),
        "one entry more": put(16, "Q", struct.unpack("<Q", whole[16:24])[0] + 1),
        "one entry less": put(16, "Q", struct.unpack("<Q", whole[16:24])[0] - 1),
        "gigantic entry count": put(16, "Q", GIGANTIC),
        "gigantic key": put(24, "Q", GIGANTIC),
        "empty key": put(24, "Q", 0),
        "unknown value type": put(value_type, "I", 77),
        "architecture that is a number": put(value_type, "I", 4),
        "gigantic value": put(value_type + 4, "Q", GIGANTIC),
        "invalid utf-8 in a key": whole[:key] + b"\xff" + whole[key + 1 :],
        "invalid utf-8 in the architecture": whole[: value_type + 12] + b"\xff" + whole[value_type + 13 :],
        "tensor of no dimensions": put(after_name, "I", 0),
        "tensor of many dimensions": put(after_name, "I", 2**31),
        "tensor of length 0": put(after_name + 4, "Q", 0),
        "gigantic tensor": put(after_name + 4, "Q", GIGANTIC),
        "unknown tensor type": put(after_name + 20, "I", 9999),
        "quantised into no whole block": put(after_name + 20, "I", 12),
        "tensor off alignment": put(after_name + 24, "Q", 7),
        "tensor past the end": put(after_name + 24, "Q", 2**40),
        "gigantic tensor name": put(infos, "Q", GIGANTIC),
        "two tensors of one name": whole.replace(b"output_norm.weight", b"token_embd.weight\0").replace(
            b"\x12\0\0\0\0\0\0\0token_embd.weight\0", b"\x12\0\0\0\0\0\0\0token_embd.weight\0"
        )[: infos + 40],
        "a safetensors file": (write_model(folder / "model") / "model.safetensors").read_bytes(),
    }
    return _written(folder, ".gguf", contents)


def model_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    good = write_model(folder / "good")
    file = (good / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", file[:8])[0]
    header, tensors = json.loads(file[8 : 8 + length]), file[8 + length :]
    name = "model.embed_tokens.weight"

    def headed(new: bytes, size: int | None = None) -> bytes:
        return struct.pack("<Q", len(new) if size is None else size) + new + tensors

    def tensor(**changes: Any) -> bytes:
        return headed(json.dumps({**header, name: {**header[name], **changes}}).encode())

    weights = _truncated(file, 6, seed=5)
    weights |= {
        "empty": b"",
        "zeros": bytes(len(file)),
        "gigantic header": headed(file[8 : 8 + length], GIGANTIC),
        "short header": headed(file[8 : 8 + length], 5),
        "header of no length": headed(b""),
        "header that is a list": headed(b"[]"),
        "header of nul bytes": headed(bytes(length)),
        "header not utf-8": headed(file[8 : 8 + length].replace(b"embed", b"emb\xffd")),
        "unknown dtype": tensor(dtype="F33"),
        "dtype that is a number": tensor(dtype=3),
        "gigantic shape": tensor(shape=[GIGANTIC, GIGANTIC]),
        "negative shape": tensor(shape=[-8, 4]),
        "other shape": tensor(shape=[8, 5]),
        "text for a shape": tensor(shape="8x4"),
        "no shape": headed(json.dumps({name: {"dtype": "F32"}}).encode()),
        "offsets past the end": tensor(data_offsets=[0, 10**9]),
        "negative offsets": tensor(data_offsets=[-4, 124]),
        "offsets that overlap": tensor(data_offsets=[0, 64]),
        "offsets the wrong way": tensor(data_offsets=[128, 0]),
        "bytes too many": file + b"more",
        "a pickle": b"\x80\x04K\x01.",
    }
    texts: dict[str, list[bytes]] = {
        "config.json": [
            *(b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", bytes(20), b"{}", b'{"a": 1, "a"}'),
            *(json.dumps({**CONFIG, **change}).encode() for change in _configurations()),
        ],
        "tokenizer.json": [
            *(b"", b"{", b"[]", b"{}", b"null", b"\xff", bytes(30)),
            *_tokenizers((good / "tokenizer.json").read_text()),
        ],
        "tokenizer_config.json": [b"{", b"[]", b"\xff", b"null", bytes(4)],
        "special_tokens_map.json": [b"{", b'"pad"'],
        "generation_config.json": [b"{", b"[1]"],
    }
    changes = [("model.safetensors", what, content) for what, content in weights.items()]
    changes += [
        (file, str(content[:60]), content) for file, contents in texts.items() for content in contents
    ]
    for number, (changed, what, content) in enumerate(changes):
        copy = folder / str(number)
        shutil.copytree(good, copy)
        (copy / changed).write_bytes(content)
        yield f"{changed}: {what}", copy


def _configurations() -> list[dict[str, Any]]:
    values: list[Any] = [None, "8", -8, 0, 7.5, float("nan"), {}, True, GIGANTIC]
    changes = [{"vocab_size": value} for value in values]
    changes += [{"hidden_size": value} for value in ("4", -4, 0, 4.5, 64)]
    changes += [{"num_hidden_layers": value} for value in ("1", -1, 0, 99)]
    changes += [{"model_type": value} for value in (None, 3, "", "lama", ["llama"], "../llama")]
    changes += [{"transformers_weights": "../outside.safetensors"}, {"auto_map": {"AutoConfig": "a/b--c.D"}}]
    return changes


def _tokenizers(good: str) -> list[bytes]:
    whole = json.loads(good)
    models: list[Any] = [None, {}, [], "WordLevel", {**whole["model"], "vocab": None}]
    models += [{**whole["model"], "vocab": {"a": -1}}, {**whole["model"], "type": "Unheard"}]
    changes = [{**whole, "model": model} for model in models]
    changes += [{**whole, "added_tokens": "x"}, {**whole, "pre_tokenizer": {"type": "Unheard"}}]
    return [json.dumps(change).encode() for change in changes] + [good[: len(good) // 2].encode()]


def flags() -> list[list[str]]:
    numbers = {
        "--lr": ["nan", "inf", "-inf", "-1", "0", "1", "1e400", "-0.0", "lots", ""],
        "--beta": ["nan", "inf", "-inf", "-1", "0", "1e400", "x"],
        "--epochs": ["0", "-1", "1.5", "nan", "1e3", "9" * 5000],
        "--effective-batch": ["0", "-4", "inf", "2.5"],
        "--max-train-pairs": ["0", "-1", "nan", "0x10"],
        "--max-eval-pairs": ["0", "-9", "many"],
        "--max-trials": ["0", "-1", "nan"],
        "--seeds": ["x", "1.5", "nan"],
    }
    words = {
        "--models": [
            "",
            " ",
            "=",
            "a=",
            "=a",
            "../../etc",
            "/etc/passwd",
            "a\0b",
            "x" * 5000,
            "\ud800",
            "a/b/c",
            "~no-such-user/x",
            "acme/" + "x" * 5000,
        ],
        "--rewards": ["", "EX_RM", "ex_rm\0", "../ex_rm", "x" * 5000],
        "--train-sets": [
            "",
            "a=",
            "../..",
            "/dev/null",
            "/proc/self/mem",
            "a\0b",
            "x" * 5000,
            "/etc/passwd",
            ".",
        ],
        "--eval-sets": ["", "a=", "/dev/null", "\udcff", "x/" * 3000, "acme/" + "x" * 5000],
        "--category": ["", "=", "/", "a/b", "mine/other=x", "a/b=domain-shift", "\0"],
        "--only": ["", "=", "model", "model=", "colour=red", "model=\0", "x=*"],
        "--name": ["", "..", "../..", "/", "\0", "x" * 5000, "///"],
        "--storage": ["\0", "/proc/x", "x" * 5000, "/dev/null", "/dev/null/store"],
        "--profile": ["", "huge"],
        "--backend": ["", "dask"],
    }
    pairs = [[flag, value] for values in (numbers, words) for flag in values for value in values[flag]]
    pairs += [
        ["--seeds", "1", "1"],
        ["--models", "llama-64", "llama-64"],
        ["--no-such-flag"],
        ["fly"],
        ["--lr"],
    ]
    return pairs
