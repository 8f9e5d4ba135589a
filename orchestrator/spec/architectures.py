"""The architecture of a sweep's models, without weights: catalog, config.json, or the meta device in another process."""

import json
from pathlib import Path

from orchestrator.spec import catalog
from trainers.errors import ModelError
from trainers.models.architecture import Architecture, of_config, on_meta_device
from trainers.models.gguf_header import architecture_numbers
from trainers.specs import ModelSpec


def architecture_of(model: ModelSpec, *, ask: bool = False) -> Architecture | None:
    """The numbers of a model; None where they are not known.

    With `ask`, an architecture that no formula counts is built on the meta device by another process, which takes
    seconds, and for a hub model fetches its config.json.
    """
    known = catalog.architecture(model)
    if known is not None:
        return known
    path = Path(model.source)
    if path.exists():
        known = _of_files(path)
    if known is not None or not ask or path.is_file():
        return known
    try:
        return on_meta_device(model.source, model.revision)
    except ModelError:
        return None


def _of_files(path: Path) -> Architecture | None:
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    config = path / "config.json"
    if config.is_file():
        try:
            loaded = json.loads(config.read_bytes())
        except (OSError, ValueError):
            return None
        return of_config(loaded) if isinstance(loaded, dict) else None
    return of_config(architecture_numbers(files[0])) if len(files) == 1 else None
