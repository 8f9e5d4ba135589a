"""Base models of the hub, fetched before the trials that load them: while those run, nobody sees the hub's progress bars."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.spec.stages import BaseModel, ReferenceStage, SampleStage, TrainStage, TrialPlan
from orchestrator.store.artifacts import Store

# What loading a model reads of its repository. Pickles are left to that: where there are safetensors, nobody wants them.
LOADED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "model*.safetensors")
IN_FOLDERS = "*/*"


def fetch_models(todo: Sequence[TrialPlan], store: Store, say: Callable[[str, str], None]) -> None:
    """Fetch the weights that trainings and reference passes of `todo` need. `say` takes a sentence and its style.

    What cannot be fetched is no error here: the trial that loads it says why.
    """
    needed = {
        stage.base
        for item in todo
        for stage in item.missing(store)
        if isinstance(stage, TrainStage | ReferenceStage | SampleStage)
    }
    for base in sorted(needed, key=lambda base: base.name):
        if base.origin is None and not Path(base.location).is_dir() and not _has_weights(base):
            _fetch(base, say)


def _has_weights(base: BaseModel) -> bool:
    """Whether the hub's cache holds the safetensors, and all of them."""
    index = _cached(base, "model.safetensors.index.json")
    if index is None:
        return _cached(base, "model.safetensors") is not None
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return all(_cached(base, shard) is not None for shard in shards)


def _cached(base: BaseModel, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base.location, name, revision=base.revision)
    return Path(found) if isinstance(found, str) else None


def _fetch(base: BaseModel, say: Callable[[str, str], None]) -> None:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.utils import tqdm

    if constants.HF_HUB_OFFLINE:
        return
    # What it says of its own retries is said once, by us.
    hub_logging.set_verbosity_error()
    say(f"model {base.name}: downloading {base.location}", "")
    try:
        snapshot_download(
            base.location,
            revision=base.revision,
            allow_patterns=list(LOADED),
            ignore_patterns=IN_FOLDERS,
            # Of its three bars one would be drawn into pipes, too.
            tqdm_class=functools.partial(tqdm, disable=None),
        )
    except Exception as error:
        say(f"model {base.name}: not downloaded ({type(error).__name__}); its trials try again", "yellow")
