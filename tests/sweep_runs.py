"""The commands of sweeps/ in this process, at their smallest: no Ray, an untrained two-layer model."""

from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from orchestrator import cli
from orchestrator.artifacts import Store


def run_sweep(name: str, build: Any, profiles: Any, storage: Path, *arguments: str) -> int:
    """The exit code of the command, with the inline backend and the laptop profile."""
    words = [*arguments, "--profile", "laptop", "--backend", "inline", "--storage", str(storage)]
    with pytest.raises(SystemExit) as ended:
        cli.main(name, build, storage.parent, words, profiles=profiles)
    return int(ended.value.code or 0)


def trial_rows(storage: Path, sweep: str) -> list[dict[str, Any]]:
    """The rows of the sweep's trials.parquet."""
    return parquet.read_table(Store(storage).sweep_dir(sweep) / "trials.parquet").to_pylist()
