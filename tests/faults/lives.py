"""Commands as real processes that can be killed, forked from a server that has paid for the imports."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from orchestrator.store.artifacts import Store

ROOT = Path(__file__).resolve().parent.parent.parent
# Of a log, what the clock and the machine say.
CLOCK = ["time", "step_s"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preloaded"])


def grid_life(
    storage: Path, arguments: Sequence[str], before: Callable[[], None] | None = None
) -> BaseProcess:
    """Start `python sweeps/full_grid.py` with these arguments; what it prints is added to <storage>.txt.

    `before` is called in the new process first. A --storage among the arguments is taken instead of `storage`.
    """
    words = [*arguments] if "--storage" in arguments else [*arguments, "--storage", str(storage)]
    return forked(storage, _grid_command, (words, storage.parent, before))


def forked(beside: Path, main: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    """Start `main` in a new process; what it prints is added to <beside>.txt."""
    process = _context.Process(target=_live, args=(Path(f"{beside}.txt"), main, arguments))
    process.start()
    return process


def lived(
    storage: Path,
    arguments: Sequence[str],
    before: Callable[[], None] | None = None,
    *,
    exits: int = 0,
    within_s: float = 600.0,
) -> str:
    """Run such a command to its end, and expect its exit code; what it printed."""
    said_before = len(output(storage))
    life = grid_life(storage, arguments, before)
    life.join(within_s)
    if life.exitcode is None:
        life.kill()
        life.join()
    said = output(storage)[said_before:]
    assert life.exitcode == exits, said
    assert "Traceback" not in said
    return said


def output(storage: Path) -> str:
    """What all lives on this storage have printed."""
    file = Path(f"{storage}.txt")
    return file.read_text() if file.is_file() else ""


def _live(log: Path, main: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(log.parent)
    main(*arguments)


def _grid_command(words: list[str], folder: Path, before: Callable[[], None] | None) -> None:
    if before is not None:
        before()
    from orchestrator.cli.main import Grid, main
    from orchestrator.report import page
    from sweeps.full_grid import full_grid

    # Dozens of lives end with a report, and each would draw for seconds what tests/orchestrator looks at.
    page.every_figure = lambda *_: iter(())

    sys.argv = [str(ROOT / "sweeps" / "full_grid.py"), *words]
    main(Grid(build=full_grid), folder / "full_grid.py", arguments=words)


def artifacts(storage: Path) -> dict[str, dict[str, bytes | list]]:
    """Every committed artifact, `stage/key` → file → its bytes; of logs the rows without their clock."""
    store = Store(storage)
    found: dict[str, dict[str, bytes | list]] = {}
    for manifest in sorted((storage / "artifacts").glob("*/*/manifest.json")):
        stage, key = manifest.parent.parent.name, manifest.parent.name
        folder = store.read(stage, key)
        found[f"{stage}/{key}"] = {
            str(file.relative_to(folder)): _content(file) for file in folder.rglob("*") if file.is_file()
        }
    return found


def _content(file: Path) -> bytes | list:
    if file.name != "log.parquet":
        return file.read_bytes()
    table: pa.Table = parquet.read_table(file)
    return table.drop_columns(CLOCK).to_pylist()


def leftovers(storage: Path) -> list[str]:
    """What a sweep that came to its end must not leave behind, relative to the storage."""
    attempts = [
        folder
        for folder in (storage / "artifacts").glob("*/*/*")
        if folder.is_dir() and folder.name not in _text(folder.parent / "manifest.json")
    ]
    drafts = list(storage.rglob(".draft-*")) + list((storage / "checkpoints").glob("*"))
    leases = list((storage / "leases").glob("*")) + list((storage / "drivers").glob("*"))
    return sorted(str(path.relative_to(storage)) for path in [*attempts, *drafts, *leases])


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""
