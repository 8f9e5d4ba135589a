"""MLflow's database in the storage folder, for sweeps without a tracking server."""

import contextlib
import os
import sqlite3
import uuid
from pathlib import Path

from orchestrator.store.artifacts import Store
from trainers.errors import SpecError
from trainers.storage import DRAFT

EXPERIMENT = "rmsweep"
# MLflow keeps absolute paths: what lies in a folder of this name is next to its database, wherever that was moved.
FILES = "mlflow-artifacts"
_FOLLOW = (
    f"UPDATE experiments SET artifact_location = :now WHERE artifact_location LIKE '%/{FILES}'",
    f"UPDATE runs SET artifact_uri = :now || substr(artifact_uri, instr(artifact_uri, '/{FILES}/') + {len(FILES) + 1}) "
    f"WHERE artifact_uri LIKE '%/{FILES}/%'",
)


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
    folder = file.with_name(FILES).as_uri()
    if not file.is_file() and file.parent.is_dir() and os.access(file.parent, os.W_OK):
        _make(file)
    elif file.is_file():
        known = (
            f"SELECT 1 FROM experiments WHERE artifact_location LIKE '%/{FILES}' AND artifact_location <> ?"
        )
        try:
            with contextlib.closing(sqlite3.connect(file, timeout=30)) as database, database:
                if database.execute(known, (folder,)).fetchone():
                    for statement in _FOLLOW:
                        database.execute(statement, {"now": folder})
        except sqlite3.Error as error:
            raise OSError(f"{file} cannot be told where its files are now ({error})") from error
    return folder


def _make(file: Path) -> None:
    """Make the database in one step: MLflow cannot continue an interrupted migration."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    draft = file.with_name(f"{DRAFT}{uuid.uuid4().hex}.db")
    try:
        # Another driver may have made it meanwhile. Without hard links, MLflow makes it in place; where it cannot, it says why.
        with contextlib.suppress(OSError, MlflowException):
            MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)
