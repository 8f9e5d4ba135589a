"""Who a model is: its hub id and revision, or the digest of its local files; found without torch.

A revision that the hub told is kept in sweeps/revisions.lock.json.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from orchestrator.spec.stages import BaseModel, ConvertStage, PretrainStage
from orchestrator.spec.trials import content_key
from orchestrator.store.artifacts import Store
from trainers.data import worlds
from trainers.errors import ModelError
from trainers.models.folders import code_files, require_sound_model
from trainers.models.gguf_header import require_sound_gguf
from trainers.models.tiny import CHAT_TEMPLATE, TINY_MODELS
from trainers.specs import BUILTIN, ModelSpec
from trainers.storage import digest_file, replace

REVISION_LOCK = Path("sweeps/revisions.lock.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_CONFIGURATIONS = ("config.json", "generation_config.json")
_NO_TOKENIZER_ENDINGS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf"),
    *(".md", ".png", ".jpg"),
)


def identify_model(
    spec: ModelSpec, store: Store, *, lock: Path = REVISION_LOCK, fetch: bool = True
) -> BaseModel:
    """The base model with its key. Raises ModelError where it cannot be found.

    Without `fetch`, a hub model of unknown revision has a key that no artifact has; see `BaseModel.fetched`.
    """
    if spec.source.startswith(BUILTIN):
        return _tiny_model(spec)
    path = Path(spec.source)
    if path.exists():
        gguf = _gguf_file(path)
        return _gguf_model(spec, gguf) if gguf else _folder_model(spec, path)
    if not HUB_ID.fullmatch(spec.source):
        raise ModelError(f"model {spec.name}: there is no file or folder {spec.source}, and it is no hub id.")
    revision = spec.revision or _read_lock(lock).get(spec.source)
    if revision is None and fetch:
        revision = hub_revision(spec, lock)
    # The revision names the code, too; that it is run is what the key adds.
    trusted = {"code": True} if spec.trust.trust_remote_code else {}
    key = content_key("model", 1, id=spec.source, revision=revision, **trusted)
    return BaseModel(
        name=spec.name,
        key=key,
        tokenizer_key=key,
        precision=spec.precision,
        location=spec.source,
        revision=revision,
        origin=None,
        trust=spec.trust,
    )


def _tiny_model(spec: ModelSpec) -> BaseModel:
    config = TINY_MODELS[spec.source.removeprefix(BUILTIN)]
    origin = PretrainStage(model=config, name=spec.name)
    tokenizer_key = content_key("tokenizer", 1, vocabulary=worlds.VOCABULARY, template=CHAT_TEMPLATE)
    return BaseModel(
        name=spec.name, key=origin.key, tokenizer_key=tokenizer_key, precision=spec.precision, origin=origin
    )


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is or holds; a folder with safetensors beside it is taken as that."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path} is no model: give a folder with config.json and safetensors, or a .gguf file."
            )
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or list(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ModelError(
            f"{path} holds {len(files)} GGUF files; name one of them: {', '.join(f.name for f in files)}."
        )
    return files[0]


def _gguf_model(spec: ModelSpec, file: Path) -> BaseModel:
    require_sound_gguf(file)
    origin = ConvertStage(file=str(file.absolute()), digest=digest_file(file), name=spec.name)
    return BaseModel(
        name=spec.name, key=origin.key, tokenizer_key=origin.key, precision=spec.precision, origin=origin
    )


def _folder_model(spec: ModelSpec, path: Path) -> BaseModel:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is no model: it has no config.json and no .gguf file.")
    weights = require_sound_model(path, spec.trust)
    # Code that is run can change every result; a file that is only there is no part of it.
    ran = _digests(code_files(path) if spec.trust.trust_remote_code else [], path)
    # Tokenizers come in many files: all that is not weights, their configuration or prose may be part of one.
    tokenizer = [
        file
        for file in sorted(path.iterdir())
        if file.is_file()
        and file.name not in _CONFIGURATIONS
        and not file.name.endswith(_NO_TOKENIZER_ENDINGS)
    ]
    return BaseModel(
        name=spec.name,
        key=content_key("model", 1, files=_digests([path / "config.json", *weights], path), code=ran),
        tokenizer_key=content_key("tokenizer", 1, files=_digests(tokenizer, path), code=ran),
        precision=spec.precision,
        location=str(path.absolute()),
        origin=None,
        trust=spec.trust,
    )


def _digests(files: Iterable[Path], folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest_file(file) for file in files}


def hub_revision(spec: ModelSpec, lock: Path) -> str:
    """The commit that a hub id stands for as the hub says now; locked from then on. Raises ModelError."""
    from huggingface_hub import HfApi

    try:
        revision = HfApi().model_info(spec.source).sha
    except Exception as error:
        raise ModelError(
            f"model {spec.name}: the hub did not answer for {spec.source} ({type(error).__name__}). Check the name, "
            "the network, and for a gated model its licence and HF_TOKEN; or give a local folder."
        ) from error
    if revision is None:
        raise ModelError(f"model {spec.name}: the hub gave no revision for {spec.source}.")
    try:
        replace(
            lock, json.dumps({**_read_lock(lock), spec.source: revision}, indent=1, sort_keys=True) + "\n"
        )
    except OSError as error:
        raise ModelError(f"model {spec.name}: its revision cannot be noted in {lock} ({error}).") from error
    return revision


def _read_lock(lock: Path) -> dict[str, str]:
    if not lock.is_file():
        return {}
    try:
        locked = json.loads(lock.read_text())
    except ValueError as error:
        raise ModelError(
            f"{lock} is not JSON ({error}); mend it, or delete it to ask the hub again."
        ) from error
    if not isinstance(locked, dict):
        raise ModelError(f"{lock} must hold an object, hub id to revision; delete it to ask the hub again.")
    return locked
