"""MLflow's database in the storage folder, for sweeps without a tracking server: how it is made, and moved with its folder."""

import contextlib
import hashlib
import os
import sqlite3
import uuid
from pathlib import Path

from orchestrator.store.artifacts import Store
from trainers.errors import SpecError
from trainers.storage import DRAFT

EXPERIMENT = "rmsweep"
SHARED_VIEW = "mlflow.sharedViewState."
_ARTIFACTS = "mlflow-artifacts"


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


def _database(uri: str) -> Path | None:
    plain = uri.startswith("sqlite:///") and "?" not in uri
    return Path(uri.removeprefix("sqlite:///")).absolute() if plain else None


def make_database(uri: str) -> None:
    """Make the database, unless it exists, in one step: MLflow cannot continue an interrupted migration."""
    file = _database(uri)
    if file is None or file.exists() or not file.parent.is_dir():
        return
    from mlflow import MlflowClient

    draft = file.with_name(f"{DRAFT}{uuid.uuid4().hex}.db")
    try:
        MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
        # Another driver may have made it meanwhile; without hard links, MLflow makes it in place.
        with contextlib.suppress(OSError):
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def artifacts_beside(uri: str) -> str | None:
    """Return the URI of the folder with the files of an embedded database's runs; None for a server."""
    if not uri.startswith("sqlite:"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / _ARTIFACTS).as_uri()


def follow_storage(uri: str) -> None:
    """Update the absolute paths of run files in a database that was moved with its folder. Raises OSError."""
    file, now = _database(uri), artifacts_beside(uri)
    if file is None or not file.is_file():
        return
    places = "SELECT artifact_location FROM experiments WHERE name = ?"
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as database, database:
            for (before,) in database.execute(places, (EXPERIMENT,)).fetchall():
                if before == now or not before.endswith(f"/{_ARTIFACTS}"):
                    continue
                for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? "
                        f"OR substr({column}, 1, ?) = ?",
                        (now, len(before) + 1, before, len(before) + 1, f"{before}/"),
                    )
    except sqlite3.Error as error:
        raise OSError(f"{file} cannot be told where its files are now ({error})") from error
