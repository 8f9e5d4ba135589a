"""Download base models from the hub before their trials start, while the user can see the progress."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.spec.stages import BaseModel, ReferenceStage, SampleStage, TrainStage, TrialPlan
from orchestrator.store.artifacts import Store

# The files that loading a model reads. Where there are only pickles, loading downloads them itself.
LOADED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "model*.safetensors")
IN_FOLDERS = "*/*"


def fetch_models(todo: Sequence[TrialPlan], store: Store, say: Callable[[str, str], None]) -> None:
    """Download the models that stages of `todo` load. `say` takes a sentence and its style.

    A failed download is no error here: the trial that loads the model says why.
    """
    needed = {
        stage.base
        for item in todo
        for stage in item.missing(store)
        if isinstance(stage, TrainStage | ReferenceStage | SampleStage)
    }
    for base in sorted(needed, key=lambda base: base.name):
        if base.origin is None and not Path(base.location).is_dir():
            _fetch(base, say)


def _fetch(base: BaseModel, say: Callable[[str, str], None]) -> None:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils import tqdm

    if constants.HF_HUB_OFFLINE:
        return
    # We report a failure once; the hub would report each of its retries.
    hub_logging.set_verbosity_error()
    fetch: Callable[..., Any] = functools.partial(
        snapshot_download,
        base.location,
        revision=base.revision,
        allow_patterns=list(LOADED),
        ignore_patterns=IN_FOLDERS,
        # One of its bars would otherwise be drawn into pipes, too.
        tqdm_class=functools.partial(tqdm, disable=None),
    )
    try:
        try:
            missing = any(file.will_download for file in fetch(dry_run=True))
        except DryRunError:
            # The hub does not answer; a model that is in the cache needs no word of that.
            missing = not fetch(local_files_only=True)
        if missing:
            say(f"model {base.name}: downloading {base.location}", "")
            fetch()
    except Exception as error:
        say(f"model {base.name}: not downloaded ({type(error).__name__}); its trials try again", "yellow")
