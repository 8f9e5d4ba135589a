"""What an artifact's manifest says: read back only as it was written, and naming nothing outside of its folder."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from trainers.disk import SEAL, digest_file, seal
from trainers.errors import Damaged, StorageError
from trainers.objects import Location


def read_manifest(file: Location, stage: str, key: str) -> dict[str, Any] | None:
    """The manifest of artifact stage/key, None where there is none. Raises Damaged, StorageError."""
    try:
        loaded = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{file} cannot be read ({error}); see to the disk, and run again.") from error
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict) or loaded.get(SEAL) != seal(loaded):
        raise Damaged(f"{file} is not what was written", stage, key)
    _require_inside(file, loaded["attempt"], *loaded["files"])
    return loaded


def _require_inside(manifest: Location, *names: object) -> None:
    """Refuse names that lead out of the artifact's folder. Raises StorageError."""
    for name in names:
        text = name if isinstance(name, str) else ""
        parts = text.split("/")
        inside = text.strip("./") and parts[0] and ".." not in parts
        if not inside or "\\" in text or "\0" in text:
            raise StorageError(
                f"{manifest} names {name!r}, which leads out of its folder; delete {manifest.parent}."
            )


def holds_weights(name: str) -> bool:
    """Whether a file of a training holds weights, after its last epoch or an earlier one."""
    return name.startswith(("model/", "model-epoch-")) and name.endswith(".safetensors")


def weights_digest(trained: Mapping[str, Any] | None) -> str | None:
    """One digest of all weights that a training's manifest names, evicted or not; None where there are none."""
    named = trained["files"].items() if trained else ()
    files = sorted((name, said["sha256"]) for name, said in named if holds_weights(name))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else None


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that a result may owe its last digits to."""
    names = ("rmsweep", "torch", "transformers", "deepspeed", "ray", "tokenizers", "pyarrow", "mlflow")
    return {name: metadata.version(name) for name in names}


def is_written(file: Path, digest: str) -> bool:
    """Whether a local file is there and has the digest that its manifest gives."""
    return file.is_file() and digest_file(file) == digest
