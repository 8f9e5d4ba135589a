"""MLflow's database in the storage folder, for sweeps without a tracking server: how it is made, and moved with its folder."""

import contextlib
import hashlib
import os
import sqlite3
import tempfile
from pathlib import Path

from orchestrator.store.artifacts import Store
from trainers.errors import SpecError
from trainers.storage import DRAFT

EXPERIMENT = "rmsweep"
SHARED_VIEW = "mlflow.sharedViewState."


def shared_view_tag(sweep: str, view: str) -> str:
    """Return the tag of the experiment that holds what MLflow's page shows of a sweep, as its `runs` or as `charts`."""
    return f"{SHARED_VIEW}{hashlib.sha256(f'{sweep}/{view}'.encode()).hexdigest()}"


def default_uri(store: Store) -> str:
    """Return the URI of the database inside the storage folder. Raises SpecError if the storage is no folder."""
    if not isinstance(store.root, Path):
        raise SpecError(
            f"--storage {store.root} cannot hold MLflow's database: give a tracking server with --tracking-uri or "
            "MLFLOW_TRACKING_URI (http://…, or sqlite:///FILE on this machine)."
        )
    return f"sqlite:///{store.root / 'mlflow.db'}"


def open_database(uri: str) -> str | None:
    """Make the database, unless it exists, and return the URI of the folder with the files of its runs; None for a server.

    Raises OSError.
    """
    if not uri.startswith("sqlite:///"):
        return None
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    folder = file.with_name("mlflow-artifacts").as_uri()
    if file.is_file():
        _follow_storage(file, folder)
    elif file.parent.is_dir() and os.access(file.parent, os.W_OK):
        _make(file)
    return folder


def _make(file: Path) -> None:
    """Make the database in one step: MLflow cannot continue an interrupted migration."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    # Another driver may have made it meanwhile. Without hard links, MLflow makes it in place; where it cannot, it says why.
    with (
        contextlib.suppress(OSError, MlflowException),
        tempfile.TemporaryDirectory(prefix=DRAFT, dir=file.parent) as folder,
    ):
        MlflowClient(tracking_uri=f"sqlite:///{folder}/{file.name}").search_experiments(max_results=1)
        os.link(f"{folder}/{file.name}", file)


def _follow_storage(file: Path, folder: str) -> None:
    """Write the present folder into a database that was moved, because MLflow keeps absolute paths. Raises OSError."""
    place = "SELECT artifact_location FROM experiments WHERE name = ?"
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as database, database:
            for (before,) in database.execute(place, (EXPERIMENT,)).fetchall():
                if before == folder or Path(before).name != Path(folder).name:
                    continue
                for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                    database.execute(
                        f"UPDATE {table} SET {column} = replace({column}, ?, ?) "
                        f"WHERE {column} = ? OR {column} LIKE ? || '/%'",
                        (before, folder, before, before),
                    )
    except sqlite3.Error as error:
        raise OSError(f"{file} cannot be told where its files are now ({error})") from error
