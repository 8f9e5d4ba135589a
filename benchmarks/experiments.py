"""How long every experiment but the grid takes at laptop size, one after another, in a storage of their own.

python -m benchmarks.experiments
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.load import benchmark_folder

_REPOSITORY = Path(__file__).resolve().parent.parent
# What analyses of a finished grid read; not counted.
GRID = "full_grid.py --profile laptop --only train=tiny_world --models llama-64 --backend inline"
CANDIDATES = (
    "full_grid.py --name best_of_grid --profile laptop --only train=tiny_world --models llama-64 --backend inline "
    "--eval-sets tiny_world tiny_world_candidates --category 'tiny_world/tiny_world_candidates=token-level shift'"
)
EXPERIMENTS = (
    "persona.py --profile laptop --backend inline",
    "hamiltonian.py --profile laptop --backend inline",
    "ablations.py --profile laptop --backend inline",
    "learning_dynamics.py",
    "theory.py",
    "hidden_representations.py",
    "learning_rates.py --profile laptop --backend inline",
    "mitigation.py --profile laptop --backend inline",
    "domain_shift.py",
    "token_overlap.py",
    "persona_prompts.py",
    "margins.py --sweep best_of_grid",
)


def main(storage: Path | None = None) -> None:
    """Run them, and print the table."""
    with benchmark_folder(storage, "experiments") as where:
        for command in (GRID, CANDIDATES):
            _took_s(command, where)
        rows = [(command, _took_s(command, where)) for command in EXPERIMENTS]
    table = Table(title="experiments at laptop size", title_justify="left")
    table.add_column("sweeps/")
    table.add_column("wall s", justify="right")
    for command, seconds in [*rows, ("together", sum(seconds for _, seconds in rows))]:
        table.add_row(command, f"{seconds:.0f}")
    Console().print(table)


def _took_s(command: str, storage: Path) -> float:
    """Seconds of one command. Exits where it fails, with what it said."""
    sweep, *words = shlex.split(command)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, f"sweeps/{sweep}", *words, "--storage", str(storage)],
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


if __name__ == "__main__":
    tyro.cli(main)
