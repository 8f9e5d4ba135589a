"""What the driver, Tune, the coordinator and the artifacts cost per trial: a sweep whose stages compute nothing.

python -m benchmarks.load --trials 1000 --sets 10 --backend ray

Everything but the stages is the real thing: planning, leases, the gate, the state file, MLflow's writer, the report.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import psutil
import tyro
from rich.console import Console
from rich.table import Column, Table
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.load_stages import AT_ONCE, standing_in, standing_in_on_ray
from orchestrator.cli import run
from orchestrator.cli.options import Options
from orchestrator.cli.session import Session
from orchestrator.report.results import sweep_results
from orchestrator.store.artifacts import Store
from orchestrator.store.records import read_declaration
from orchestrator.tracking.database import default_uri
from orchestrator.tracking.mlflow import SHOWN
from sweeps.full_grid import full_grid

NAME = "load"
REWARDS = ("ex_rm", "im_rm")
MODELS = 100
SAMPLE_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A simulated sweep: up to 100 models × 2 reward types × as many seeds as it takes."""

    trials: int = 1000
    sets: int = 10
    """Evaluation sets."""
    backend: Literal["ray", "inline"] = "ray"
    storage: Path | None = None
    """Where the artifacts are kept (default: a temporary folder that is removed at the end)."""


@contextlib.contextmanager
def sampled() -> Iterator[list[tuple[float, float, float]]]:
    """Yield a list of (Unix time, resident MB, processor seconds so far) of this process that grows twice a second."""
    samples: list[tuple[float, float, float]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_EVERY_S):
            samples.append((time.time(), psutil.Process().memory_info().rss / 1e6, time.process_time()))

    threading.Thread(target=sample, daemon=True).start()
    try:
        yield samples
    finally:
        done.set()


def make_session(load: Load, folder: Path) -> Session:
    """The invocation of a sweep over models and data sets that are written into `folder`; its storage is there."""
    models = min(MODELS, max(1, load.trials // len(REWARDS)))
    seeds = range(-(-load.trials // (models * len(REWARDS))))
    options = Options(
        profile="laptop",
        backend=load.backend,
        name=NAME,
        models=tuple(model_folder(folder / f"model{number}", number) for number in range(models)),
        rewards=REWARDS,
        train_sets=(dataset_folder(folder / "trained", 0),),
        eval_sets=tuple(dataset_folder(folder / f"set{number}", 1 + number) for number in range(load.sets)),
        seeds=tuple(seeds),
        max_trials=load.trials,
    )
    return session_of(options, folder)


def session_of(options: Options, folder: Path) -> Session:
    """The invocation with those options, which keeps what it says; its storage is in `folder`."""
    store = Store(folder / "store")
    return Session(
        options=options,
        sweep_name=options.name,
        store=store,
        tracking_uri=default_uri(store),
        folder=folder,
        console=Console(file=io.StringIO(), width=120),
    )


def model_folder(folder: Path, number: int) -> str:
    """A folder that is a model to the planner; all share one tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"vocab_size": 4, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 1, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2, "d": 3}, unk_token="a"))
    (folder / "tokenizer.json").write_text(words.to_str())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    weight = np.full((4, 1), number, dtype=np.float32)
    save_file({"model.embed_tokens.weight": weight}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def dataset_folder(folder: Path, number: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [
            {"prompt": f"{number} {split} {row}", "chosen": f"good {row}", "rejected": f"bad {row}"}
            for row in range(4)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def storage_of(given: Path | None) -> contextlib.AbstractContextManager[str]:
    """Give the folder, which is kept, or if none is given a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        return contextlib.nullcontext(str(given.absolute()))
    # Processes of the benchmark may still write into it.
    return tempfile.TemporaryDirectory(prefix="rmsweep-", ignore_cleanup_errors=True)


def run_s(session: Session, build: run.Build) -> float:
    """Run the sweep as another process would, with every file checked, and return the seconds that the command took."""
    fresh, began = dataclasses.replace(session, store=Store(session.store.root)), time.perf_counter()
    if code := run.run(fresh, build):
        sys.exit(f"exit code {code}: {session.console.file.getvalue()}")  # type: ignore[attr-defined]
    return time.perf_counter() - began


def main(load: Load) -> None:
    """Run the sweep, wait for MLflow, run it again when complete, and print the table."""
    # Measured on a Ray of its own, whatever cluster runs on this machine.
    with storage_of(load.storage) as folder, mock.patch.object(run, "cluster_address", return_value=None):
        session = make_session(load, Path(folder))
        stand_in = standing_in_on_ray if load.backend == "ray" else standing_in
        with sampled() as samples, stand_in(AT_ONCE):
            run_s(session, full_grid)
        shown, catching_up_s = session.store.sweep_dir(NAME) / SHOWN, 0.0
        for _ in itertools.takewhile(lambda _: not shown.exists(), range(20)):
            catching_up_s += run_s(session, full_grid)
        again_s = run_s(session, full_grid)
        rows = list(_measured(load, session, samples))
    rows += [
        ("MLflow, catching up afterwards, s", f"{catching_up_s:.1f}"),
        ("run again when complete, s", f"{again_s:.1f}"),
    ]
    print_table(f"{load.trials} trials × {load.sets} sets, {load.backend}", rows)


def _measured(
    load: Load, session: Session, samples: Sequence[tuple[float, float, float]]
) -> Iterator[tuple[str, str]]:
    results = sweep_results(read_declaration(NAME, session.store), session.store)
    evaluated = sum(len(result.evaluations) for result in results)
    yield "trainings found", f"{sum(result.trained for result in results)} of {load.trials}"
    yield "evaluations found", f"{evaluated} of {load.trials * load.sets}"
    # Artifacts say when stages began and ended.
    ends = sorted(result.finished for result in results)
    ends.insert(0, min(result.started or math.inf for result in results))
    yield "wall s per trial", f"{(ends[-1] - ends[0]) / load.trials:.3f}"
    at = [min(samples, key=lambda sample: abs(sample[0] - end)) for end in ends]
    for first, last in itertools.pairwise(load.trials * quarter // 4 for quarter in range(5)):
        wall_s, cpu_s = ends[last] - ends[first], at[last][2] - at[first][2]
        found = [f"{seconds / (last - first):.3f}" for seconds in (wall_s, cpu_s)]
        yield f"{first} to {last}: wall s, CPU s per trial; MB", ", ".join([*found, f"{at[last][1]:.0f}"])


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print what was measured."""
    table = Table("what", Column("measured", justify="right"), title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Load))
