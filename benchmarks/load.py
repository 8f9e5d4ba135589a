"""What the driver, Tune, the coordinator and the artifacts cost per trial: a sweep whose stages compute nothing.

python -m benchmarks.load --trials 1000 --sets 10 --backend ray

Everything but the stages is the real thing: planning, leases, the gate, the state file, MLflow's writer, the report.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
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
# What runs the trials of a command.
RUNS = {"ray": "orchestrator.run.ray.sweep.run_on_ray", "inline": "orchestrator.cli.running.run_inline"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A simulated sweep: up to 100 models × 2 reward types × as many seeds as it takes."""

    trials: int = 1000
    sets: int = 10
    """Evaluation sets."""
    backend: Literal["ray", "inline"] = "ray"
    storage: Path | None = None
    """Where the artifacts are kept (default: a temporary folder that is removed at the end)."""


@dataclass(slots=True)
class Driver:
    """Resident memory and processor time of this process; a context manager that samples while it is open.

    A sample is (Unix time, bytes, processor seconds so far).
    """

    samples: list[tuple[float, int, float]] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Driver":
        threading.Thread(target=self._sample, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _sample(self) -> None:
        while True:
            self.samples.append((time.time(), psutil.Process().memory_info().rss, time.process_time()))
            if self._done.wait(SAMPLE_EVERY_S):
                return

    def at(self, moment: float) -> tuple[float, int, float]:
        """The sample nearest to a Unix time."""
        return min(self.samples, key=lambda sample: abs(sample[0] - moment))


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


def run_again(session: Session) -> float:
    """Seconds that the command takes when nothing is left to do, every file checked as by another process."""
    fresh = dataclasses.replace(session, store=Store(session.store.root))
    began = time.perf_counter()
    code = run.run(fresh, full_grid)
    assert code == 0, f"exit code {code}"
    return time.perf_counter() - began


def quarters(ended: Sequence[float], began: float) -> list[tuple[float, float, int]]:
    """(start, end, trials) of each quarter of the trials, by when they were complete; Unix times."""
    ends = [began, *sorted(ended)]
    marks = [len(ended) * number // 4 for number in range(5)]
    return [(ends[first], ends[last], last - first) for first, last in itertools.pairwise(marks)]


@contextlib.contextmanager
def seconds_of(name: str) -> Iterator[list[float]]:
    """Yield a list that takes how long each call of a function took, which is given as `module.function`."""
    function, seconds = pkgutil.resolve_name(name), []

    def timed(*args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        function(*args, **kwargs)
        seconds.append(time.perf_counter() - began)

    with mock.patch(name, timed):
        yield seconds


@contextlib.contextmanager
def benchmark_folder(storage: Path | None, name: str) -> Iterator[Path]:
    """`storage` where it is given, and kept; else a temporary folder of that name, removed at the end."""
    if storage is not None:
        storage.mkdir(parents=True, exist_ok=True)
        yield storage.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix=f"rmsweep-{name}-"))
    try:
        yield folder
    finally:
        # Processes of the benchmark may still write into it.
        shutil.rmtree(folder, ignore_errors=True)


def main(load: Load) -> None:
    """Run the sweep, wait for MLflow, run it again when complete, and print the table."""
    # Measured on a Ray of its own, whatever cluster runs on this machine.
    with (
        benchmark_folder(load.storage, "load") as folder,
        mock.patch.object(run, "cluster_address", return_value=None),
    ):
        session = make_session(load, folder)
        stand_in = standing_in_on_ray if load.backend == "ray" else standing_in
        with Driver() as driver, stand_in(AT_ONCE), seconds_of(RUNS[load.backend]) as trials_s:
            code = run.run(session, full_grid)
        if code:
            sys.exit(f"exit code {code}: {session.console.file.getvalue()}")
        shown = session.store.sweep_dir(NAME) / SHOWN
        catching_up = [
            run_again(session) for _ in itertools.takewhile(lambda _: not shown.exists(), range(20))
        ]
        again_s = run_again(session)
        _print(load, session, trials_s[0], driver, sum(catching_up), again_s)


def _print(
    load: Load,
    session: Session,
    wall_s: float,
    driver: Driver,
    catching_up_s: float,
    again_s: float,
) -> None:
    results = list(sweep_results(read_declaration(NAME, session.store), session.store))
    ended = sorted(result.finished for result in results)
    evaluated = sum(len(result.evaluations) for result in results)
    # Artifacts say when trials ended.
    parts = list(enumerate(quarters(ended, ended[-1] - wall_s), 1))
    processor_s = [driver.at(end)[2] - driver.at(start)[2] for _, (start, end, _) in parts]
    slots = len(os.sched_getaffinity(0)) if load.backend == "ray" else 1
    print_table(
        f"{load.trials} trials × {load.sets} sets, {load.backend}",
        [
            ("trainings found", f"{sum(result.trained for result in results)} of {load.trials}"),
            ("evaluations found", f"{evaluated} of {load.trials * load.sets}"),
            ("trials that run at once", f"{slots}"),
            ("trials, s", f"{wall_s:.1f}"),
            ("trials, s per trial", f"{wall_s / load.trials:.3f}"),
            *(
                (f"quarter {n}, wall s per trial", f"{(end - start) / of:.3f}")
                for n, (start, end, of) in parts
            ),
            *(
                (f"quarter {n}, driver's CPU s per trial", f"{seconds / of:.3f}")
                for (n, (_, _, of)), seconds in zip(parts, processor_s, strict=True)
            ),
            ("driver at the start, MB", f"{driver.samples[0][1] / 1e6:.0f}"),
            *(
                (f"driver after quarter {n}, MB", f"{driver.at(end)[1] / 1e6:.0f}")
                for n, (_, end, _) in parts
            ),
            ("MLflow, catching up afterwards, s", f"{catching_up_s:.1f}"),
            ("run again when complete, s", f"{again_s:.1f}"),
        ],
    )


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print what was measured."""
    table = Table("what", Column("measured", justify="right"), title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Load))
