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
    if path.exists():
        file = _gguf_file(path)
        if file is None:
            return _folder_model(spec, path)
        read_header(file)
        gguf = ConvertStage(file=str(file.absolute()), digest=digest_file(file), name=spec.name)
        return _base(spec, gguf.key, gguf.key, origin=gguf)
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


def _gguf_file(path: Path) -> Path | None:
    """Find the GGUF file that `path` is or holds; None in a folder with safetensors, which are preferred."""
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


def _folder_model(spec: ModelSpec, path: Path) -> BaseModel:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is no model: it has no config.json and no .gguf file.")
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


def ending_tokens(base: BaseModel, *, fetch: bool = True) -> tuple[int, ...]:
    """Return the tokens that end an answer of a folder's model, which its key does not cover; () for any other model.

    With `fetch` it also asks the hub for the generation config of a hub model. Raises ModelError where a model has none,
    or one without an eos_token_id.
    """
    folder, name = Path(base.location), "generation_config.json"
    if base.origin is not None or not (folder.is_dir() or fetch):
        return ()
    try:
        file = folder / name if folder.is_dir() else _of_hub(base, name)
        ends = json.loads(file.read_text())["eos_token_id"] if file else []
        ends = tuple(sorted([ends] if isinstance(ends, int) else map(int, ends)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the policy {base.name} does not say what ends an answer: {name} of {base.location} is missing or names no "
            "eos_token_id. Give a causal language model that was saved with one, or save it in the model's folder: "
            "transformers.GenerationConfig(eos_token_id=N).save_pretrained(FOLDER)."
        ) from error
    return ends if folder.is_dir() else ()


def _of_hub(base: BaseModel, name: str) -> Path | None:
    """Return a file of a hub model, None where the hub does not answer. Raises OSError where the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(base.location, name, revision=base.revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            return None
        raise FileNotFoundError(name) from error
    except Exception:
        # Whoever loads the weights fails as well, and says why.
        return None


def _digests(files: Iterable[Path], folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest_file(file) for file in files}


def hub_revision(spec: ModelSpec, lock: Path) -> str:
    """Ask the hub for the newest commit of a model, and lock it in the file. Raises ModelError."""
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
    except Exception as error:
        # Offline, nothing is refused.
        status = getattr(getattr(error, "response", None), "status_code", None)
        return f"the token is refused for {source}" if status in (401, 403) else ""
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
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    config = path / "config.json"
    if config.is_file():
        try:
            loaded = json.loads(config.read_bytes())
        except (OSError, ValueError):
            return None
        return of_config(loaded) if isinstance(loaded, dict) else None
    return of_config(architecture_numbers(files[0])) if len(files) == 1 else None
