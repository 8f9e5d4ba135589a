"""Preparing many pairs against the tokenizer's own speed: wall time, peak memory, and their ratios.

    .venv/bin/python -m benchmarks.prepare --model MODEL --data ../shared/data/ultrafeedback --pairs 60000

*tokenizer* hands the texts of prompt, chosen and rejected response to the tokenizer in batches and does nothing else;
its time is that of those calls alone, on the clock and of all threads (CPU). *prepare* is what a sweep does: rows read and checked,
digested, written, rendered with the chat template, tokenised, and written. Each is a process of its own, with the same threads.
"""

import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from trainers.data.sources import iter_pairs, read_pairs
from trainers.specs import DatasetSpec, DrawSpec

_BATCH_TEXTS = 768


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is prepared, and with how many threads."""

    model: Path
    """Folder with a tokenizer, or with a GGUF file."""
    data: Path
    """Set whose test and train pairs are repeated, each repetition with a number of its own in it."""
    pairs: int = 60_000
    threads: int = len(os.sched_getaffinity(0))
    repetitions: int = 3
    part: Literal["", "tokenizer", "prepare"] = ""
    """Of the workers."""
    rows: Path = Path()
    """Of the workers."""


def main(arguments: Arguments) -> None:
    """Print the table."""
    if arguments.part:
        print(json.dumps(_tokenizer(arguments) if arguments.part == "tokenizer" else _prepare(arguments)))
        return
    # It brings torch and DeepSpeed, whose memory is not preparing's.
    from benchmarks.data import ready_model

    model = ready_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        _write_rows(arguments, rows)
        found: dict[str, list[dict[str, float]]] = {"tokenizer": [], "prepare": []}
        for _, part in itertools.product(range(arguments.repetitions), ("tokenizer", "prepare")):
            worker = dataclasses.replace(arguments, model=model, part=part, rows=rows)
            found[part].append(_worker(worker))
    print(
        f"{arguments.pairs} pairs, {arguments.threads} threads, {rows.name} of {found['prepare'][0]['mb']:.0f} MB"
    )
    print(
        "| repetition | tokenizer s | prepare s | of that, tokens s | prepare / tokenizer | peak of prepare, GB |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for number, (own, ours) in enumerate(zip(found["tokenizer"], found["prepare"], strict=True)):
        print(
            f"| {number} | {own['wall_s']:.1f} ({own['cpu_s']:.1f}) | {ours['wall_s']:.1f} ({ours['cpu_s']:.1f}) | "
            f"{ours['tokens_s']:.1f} | {ours['wall_s'] / own['wall_s']:.2f} ({ours['cpu_s'] / own['cpu_s']:.2f}) | "
            f"{ours['peak_gb']:.2f} |"
        )


def _worker(arguments: Arguments) -> dict[str, float]:
    words = [
        sys.executable,
        "-m",
        "benchmarks.prepare",
        "--part",
        arguments.part,
        "--rows",
        str(arguments.rows),
    ]
    words += ["--model", str(arguments.model), "--data", str(arguments.data)]
    threads = str(arguments.threads)
    environment = {**os.environ, "RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    environment["TOKENIZERS_PARALLELISM"] = "true"
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _write_rows(arguments: Arguments, file: Path) -> None:
    spec = DatasetSpec(name="data", source=str(arguments.data))
    pairs = [*read_pairs(spec, "train"), *read_pairs(spec, "test")]
    with file.open("w") as lines:
        for number, pair in zip(range(arguments.pairs), itertools.cycle(pairs), strict=False):
            prompt = f"{pair.prompt[-1].content} ({number})"
            row = {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            lines.write(json.dumps(row) + "\n")


def _tokenizer(arguments: Arguments) -> dict[str, float]:
    from trainers.pairs.templates import load_tokenizer

    tokenizer, wall_s, cpu_s = load_tokenizer(str(arguments.model)), 0.0, 0.0
    with arguments.rows.open() as lines:
        texts = (text for line in lines for text in json.loads(line).values())
        while batch := list(itertools.islice(texts, _BATCH_TEXTS)):
            began, began_cpu = time.perf_counter(), time.process_time()
            tokenizer(batch, add_special_tokens=False)
            wall_s += time.perf_counter() - began
            cpu_s += time.process_time() - began_cpu
    return {"wall_s": wall_s, "cpu_s": cpu_s}


def _prepare(arguments: Arguments) -> dict[str, float]:
    from trainers.token_files import write_tokens

    from trainers.data.records import Digest, read_written_pairs, written
    from trainers.pairs.templates import load_tokenizer
    from trainers.pairs.tokens import Counts, iter_tokens

    tokenizer, limits = (
        load_tokenizer(str(arguments.model)),
        DrawSpec(max_prompt_tokens=10_000, max_response_tokens=10_000),
    )
    with tempfile.TemporaryDirectory() as out:
        began, began_cpu = time.perf_counter(), time.process_time()
        file, digest = Path(out) / "pairs.jsonl", Digest()
        for pair in written(iter_pairs(DatasetSpec(name="data", source=str(arguments.rows)), "train"), file):
            digest.add(pair)
        began_tokens = time.perf_counter()
        rows = read_written_pairs(file)
        write_tokens(iter_tokens(rows, tokenizer, limits, "response", Counts()), Path(out) / "pairs.arrow")
        ended = time.perf_counter()
        wall_s, cpu_s = ended - began, time.process_time() - began_cpu
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "tokens_s": ended - began_tokens,
        "mb": arguments.rows.stat().st_size / 1e6,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments))
