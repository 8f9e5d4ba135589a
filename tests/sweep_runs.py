"""The commands of sweeps/ in this process, at their smallest: no Ray, an untrained two-layer model."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pyarrow import parquet

from orchestrator.cli.main import Grid, main
from orchestrator.report import page
from orchestrator.store.artifacts import Store
from orchestrator.tracking import database
from tests.faults.tracking_server import migrated_database

# The flags of the smallest training with its evaluations.
SMALL = ("--epochs", "1", "--max-train-pairs", "8", "--max-eval-pairs", "8", "--seeds", "0")


@functools.cache
def _empty_database() -> bytes:
    """MLflow's database without runs: migrating takes a second, copying nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return migrated_database(Path(folder)).read_bytes()


@contextlib.contextmanager
def _quick(*, draws: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(database, "_make", lambda file: file.write_bytes(_empty_database()))
        )
        if not draws:
            stack.enter_context(mock.patch.object(page, "every_figure", return_value=()))
        yield


def run_sweep(
    name: str,
    build: Any,
    profiles: Any,
    storage: Path,
    *arguments: str,
    follow_up: Any = None,
    draws: bool = False,
) -> int:
    """The exit code of the command, with the inline backend and the laptop profile.

    Only where it `draws` has the report its figures, which take seconds; a follow-up's own are always drawn.
    """
    words = [*arguments, "--profile", "laptop", "--backend", "inline", "--storage", str(storage)]
    experiment = Grid(build=build, profiles=profiles, follow_up=follow_up)
    with pytest.raises(SystemExit) as ended, _quick(draws=draws):
        main(experiment, storage.parent / f"{name}.py", arguments=words)
    return int(ended.value.code or 0)


def trial_rows(storage: Path, sweep: str) -> list[dict[str, Any]]:
    """The rows of the sweep's trials.parquet."""
    return parquet.read_table(Store(storage).sweep_dir(sweep) / "trials.parquet").to_pylist()


def run_analysis(module: Any, storage: Path, *arguments: str, draws: bool = True) -> int:
    """The exit code of the command of a file in sweeps/; its report has figures only where it `draws`."""
    file = storage.parent / f"{module.__name__.removeprefix('sweeps.')}.py"
    with pytest.raises(SystemExit) as ended, _quick(draws=draws):
        main(module.EXPERIMENT, file, arguments=[*arguments, "--storage", str(storage)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def artifacts(storage: Path) -> dict[str, Path]:
    """Key → folder of every analysis that is committed."""
    store = Store(storage)
    found = [file.parent.name for file in (storage / "artifacts" / "analyse").glob("*/manifest.json")]
    return {key: store.read("analyse", key) for key in found}
