"""Finds a model's identity, its architecture and whether the hub grants access, without loading weights or torch.

A model is identified by its hub id and revision, or by the digest of its local files. Revisions that the hub has told
are locked in sweeps/revisions.lock.json.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orchestrator.spec import catalog
from orchestrator.spec.keys import content_key
from orchestrator.spec.stages import BaseModel, ConvertStage, PretrainStage
from trainers.data import worlds
from trainers.data.sources import HUB_ID
from trainers.errors import ModelError
from trainers.models.architecture import Architecture, of_config, on_meta_device
from trainers.models.folders import code_files, require_sound_model
from trainers.models.gguf_header import architecture_numbers, read_header
from trainers.models.tiny import CHAT_TEMPLATE, TINY_MODELS
from trainers.specs import BUILTIN, ModelSpec
from trainers.storage import digest_file, replace

REVISION_LOCK = Path("sweeps/revisions.lock.json")
_CONFIGURATIONS = ("config.json", "generation_config.json")
_NO_TOKENIZER_ENDINGS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf"),
    *(".md", ".png", ".jpg"),
)


def identify_model(spec: ModelSpec, *, lock: Path = REVISION_LOCK, fetch: bool = True) -> BaseModel:
    """Find a model and give it its key. Raises ModelError where it cannot be found.

    Without `fetch`, a hub model of unknown revision has a key that no artifact has; see `BaseModel.fetched`.
    """
    if spec.source.startswith(BUILTIN):
        tiny = PretrainStage(model=TINY_MODELS[spec.source.removeprefix(BUILTIN)], name=spec.name)
        tokenizer_key = content_key("tokenizer", 1, vocabulary=worlds.VOCABULARY, template=CHAT_TEMPLATE)
        return _base(spec, tiny.key, tokenizer_key, origin=tiny)
    path = Path(spec.source)
    if path.suffix == ".gguf" and path.is_file():
        read_header(path)
        gguf = ConvertStage(file=str(path.absolute()), digest=digest_file(path), name=spec.name)
        return _base(spec, gguf.key, gguf.key, origin=gguf)
    if path.exists():
        return _folder_model(spec, path)
    if not HUB_ID.fullmatch(spec.source):
        raise ModelError(f"model {spec.name}: there is no file or folder {spec.source}, and it is no hub id.")
    revision = spec.revision or _read_lock(lock).get(spec.source)
    if revision is None and fetch:
        revision = hub_revision(spec, lock)
    # The revision fixes the code, too; the key adds whether it is run.
    trusted = {"code": True} if spec.trust.trust_remote_code else {}
    key = content_key("model", 1, id=spec.source, revision=revision, **trusted)
    return _base(spec, key, key, location=spec.source, revision=revision)


def _base(spec: ModelSpec, key: str, tokenizer_key: str, **found: Any) -> BaseModel:
    """Return the model with that key; --template changes the key of its tokenizer."""
    if spec.template is not None:
        tokenizer_key = content_key("template", 1, tokenizer=tokenizer_key, template=spec.template)
    return BaseModel(
        name=spec.name,
        key=key,
        tokenizer_key=tokenizer_key,
        precision=spec.precision,
        trust=spec.trust,
        template=spec.template,
        **found,
    )


def _folder_model(spec: ModelSpec, path: Path) -> BaseModel:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} is no model: give a folder with config.json and safetensors, or a .gguf file."
        )
    weights = require_sound_model(path, spec.trust)
    # Code changes results only if it is run.
    ran = _digests(code_files(path) if spec.trust.trust_remote_code else [], path)
    # Any file but weights, their configuration and prose may be part of the tokenizer.
    tokenizer = [
        file
        for file in sorted(path.iterdir())
        if file.is_file()
        and file.name not in _CONFIGURATIONS
        and not file.name.endswith(_NO_TOKENIZER_ENDINGS)
    ]
    key = content_key("model", 1, files=_digests([path / "config.json", *weights], path), code=ran)
    tokenizer_key = content_key("tokenizer", 1, files=_digests(tokenizer, path), code=ran)
    return _base(spec, key, tokenizer_key, location=str(path.absolute()))


def ending_tokens(base: BaseModel) -> tuple[int, ...]:
    """Return the tokens that end an answer of a folder's model, which its key does not cover; () for any other model.

    Raises ModelError where the folder does not say.
    """
    folder, name = Path(base.location), "generation_config.json"
    if base.origin is not None or not folder.is_dir():
        return ()
    try:
        ends = json.loads((folder / name).read_text())["eos_token_id"]
        return tuple(sorted([ends] if isinstance(ends, int) else map(int, ends)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the policy {base.name} does not say what ends an answer: {name} of {base.location} is missing or names no "
            "eos_token_id. Give a causal language model that was saved with one, or save it in the model's folder: "
            "transformers.GenerationConfig(eos_token_id=N).save_pretrained(FOLDER)."
        ) from error


def _digests(files: Iterable[Path], folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest_file(file) for file in files}


def hub_revision(spec: ModelSpec, lock: Path) -> str:
    """Ask the hub for the newest commit of a model, and lock it in the file. Raises ModelError."""
    from huggingface_hub import HfApi

    try:
        if (revision := HfApi().model_info(spec.source).sha) is None:
            raise LookupError(spec.source)
    except Exception as error:
        raise ModelError(
            f"model {spec.name}: the hub did not answer for {spec.source} ({type(error).__name__}). Check the name, "
            "the network, and for a gated model its licence and HF_TOKEN; or give a local folder."
        ) from error
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
        return {**json.loads(lock.read_text())}
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{lock} is no JSON object of hub ids and revisions ({error}); delete it to ask the hub again."
        ) from error


def denied_models(models: Iterable[ModelSpec]) -> dict[str, str]:
    """Ask the hub which models it denies to us, and return why, by name."""
    wanted = [
        model
        for model in dict.fromkeys(models)
        if not model.source.startswith(BUILTIN)
        and not Path(model.source).exists()
        and HUB_ID.fullmatch(model.source)
    ]
    if not wanted or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        answers = list(pool.map(_why_denied, [model.source for model in wanted]))
    return {model.name: why for model, why in zip(wanted, answers, strict=True) if why}


def denial(found: dict[str, str]) -> str:
    """Write the message on models that are denied, one line for each."""
    lines = "".join(f"{name}: {why}\n" for name, why in sorted(found.items()))
    return (
        f"these models cannot be had from the hub:\n{lines}"
        "Accept the licences on the models' pages, and set HF_TOKEN; or give local folders with --models NAME=PATH."
    )


def _why_denied(source: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().auth_check(source)
    except GatedRepoError:
        return f"{source} is gated, and its licence is not accepted by the account of the token (or there is none)"
    except RepositoryNotFoundError:
        return f"the hub knows no {source}, or not for this token"
    except Exception:
        # Offline, nothing is refused.
        return ""
    return ""


def architecture_of(model: ModelSpec, *, ask: bool = False) -> Architecture | None:
    """Return the architecture of a model without its weights; None if it is not known.

    With `ask`, another process builds any other architecture on the meta device, which takes seconds, and for a hub model
    fetches its config.json.
    """
    path = Path(model.source)
    known = catalog.architecture(model) or _of_files(path)
    if known is not None or not ask or path.is_file():
        return known
    try:
        return on_meta_device(model.source, model.revision)
    except ModelError:
        return None


def _of_files(path: Path) -> Architecture | None:
    if path.is_file():
        return of_config(architecture_numbers(path))
    try:
        loaded = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return of_config(loaded) if isinstance(loaded, dict) else None
