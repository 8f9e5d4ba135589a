"""Who a model or a data set is: the digests that enter keys, found without torch and without a network if possible.

A model is its hub id and revision, or the digest of its local files. A data set is its rows, whatever file they
came in. What the hub answered is remembered: revisions in sweeps/revisions.lock.json, rows in the store.
"""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from orchestrator.artifacts import Store, digest_file, replace
from orchestrator.spec import content_key
from orchestrator.stages import BaseModel, ConvertStage, PretrainStage, Split
from trainers.data import records, sources, tiny_world
from trainers.data.records import Pair
from trainers.errors import DataError, ModelError
from trainers.specs import BUILTIN, MANUAL, DatasetSpec, ModelSpec
from trainers.tiny import CHAT_TEMPLATE, TINY_MODELS

REVISION_LOCK = Path("sweeps/revisions.lock.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")


def identify_model(
    spec: ModelSpec, store: Store, *, lock: Path = REVISION_LOCK, fetch: bool = True
) -> BaseModel:
    """The base model with its key. Raises ModelError where it cannot be found."""
    if spec.source.startswith(BUILTIN):
        return _tiny_model(spec)
    path = Path(spec.source)
    if path.exists():
        gguf = _gguf_file(path)
        return _gguf_model(spec, gguf) if gguf else _folder_model(spec, path)
    if not HUB_ID.fullmatch(spec.source):
        raise ModelError(f"model {spec.name}: there is no file or folder {spec.source}, and it is no hub id.")
    revision = spec.revision or locked_revision(spec, lock, fetch=fetch)
    key = content_key("model", 1, id=spec.source, revision=revision)
    return BaseModel(
        name=spec.name,
        key=key,
        tokenizer_key=key,
        precision=spec.precision,
        location=spec.source,
        revision=revision,
        origin=None,
    )


def _tiny_model(spec: ModelSpec) -> BaseModel:
    config = TINY_MODELS[spec.source.removeprefix(BUILTIN)]
    origin = PretrainStage(model=config, name=spec.name)
    tokenizer_key = content_key("tokenizer", 1, vocabulary=tiny_world.VOCABULARY, template=CHAT_TEMPLATE)
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
    origin = ConvertStage(file=str(file.absolute()), digest=digest_file(file), name=spec.name)
    return BaseModel(
        name=spec.name, key=origin.key, tokenizer_key=origin.key, precision=spec.precision, origin=origin
    )


def _folder_model(spec: ModelSpec, path: Path) -> BaseModel:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is no model: it has no config.json and no .gguf file.")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{path} holds no safetensors weights, and other formats are not read.")
    tokenizer = [file for file in sorted(path.iterdir()) if file.name.startswith(_TOKENIZER_FILES)]
    return BaseModel(
        name=spec.name,
        key=content_key("model", 1, files=_digests([path / "config.json", *weights])),
        tokenizer_key=content_key("tokenizer", 1, files=_digests(tokenizer)),
        precision=spec.precision,
        location=str(path.absolute()),
        origin=None,
    )


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: digest_file(file) for file in files}


def locked_revision(spec: ModelSpec, lock: Path, *, fetch: bool) -> str:
    """The commit that a hub id stands for: as locked, else as the hub says now, and locked then. Raises ModelError."""
    locked: dict[str, str] = json.loads(lock.read_text()) if lock.is_file() else {}
    if spec.source in locked:
        return locked[spec.source]
    if not fetch:
        raise ModelError(f"model {spec.name}: the revision of {spec.source} is not known yet; not fetched.")
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
    replace(lock, json.dumps({**locked, spec.source: revision}, indent=1, sort_keys=True) + "\n")
    return revision


class DatasetReader:
    """Reads each split once; knows it by its rows afterwards."""

    def __init__(self, store: Store, *, fetch: bool = True) -> None:
        self._store = store
        self._fetch = fetch
        self._splits: dict[tuple[str, str], Split] = {}
        self._pairs: dict[tuple[str, str], list[Pair]] = {}

    def split(self, spec: DatasetSpec, split: str) -> Split:
        """The split's identity; its rows are in the store afterwards when `fetch`. Raises DataError."""
        source_key = content_key("source", 1, **_source_fields(spec), split=split)
        if (spec.name, split) in self._splits:
            return self._splits[spec.name, split]
        remembered = self._store.root / "sources" / f"{source_key}.json"
        is_hub = not spec.source.startswith((BUILTIN, MANUAL)) and not Path(spec.source).exists()
        if is_hub and not HUB_ID.fullmatch(spec.source):
            raise DataError(
                f"data set {spec.name}: there is no file or folder {spec.source}, and it is no hub id."
            )
        if is_hub and remembered.is_file():
            known = json.loads(remembered.read_text())
            found = Split(name=spec.name, split=split, digest=known["digest"], rows=known["rows"])
        elif is_hub and not self._fetch:
            raise DataError(f"data set {spec.name}: {spec.source} is not fetched yet.")
        else:
            pairs = self._pairs[spec.name, split] = sources.read_pairs(spec, split)
            found = Split(name=spec.name, split=split, digest=records.content_digest(pairs), rows=len(pairs))
            if self._fetch:
                self._keep(found, pairs)
            if is_hub:
                replace(remembered, json.dumps({"digest": found.digest, "rows": found.rows}))
        self._splits[spec.name, split] = found
        return found

    def rewrites(self, eval_set: DatasetSpec, train_set: DatasetSpec) -> bool:
        """Whether `eval_set` declares, by name or by its rows' originals, that it rewrites `train_set`."""
        if eval_set.rewriting_of is not None:
            return eval_set.rewriting_of == train_set.name
        pairs = self._pairs.get((eval_set.name, eval_set.test_split), [])
        originals = {pair.original_chosen for pair in pairs if pair.original_chosen is not None}
        if not originals:
            return False
        for split in (train_set.train_split, train_set.test_split):
            if sources.has_split(train_set, split):
                self.split(train_set, split)
        texts = {
            pair.chosen for (name, _), rows in self._pairs.items() if name == train_set.name for pair in rows
        }
        return 2 * len(originals & texts) >= len(originals)

    def _keep(self, split: Split, pairs: list[Pair]) -> None:
        if self._store.complete("dataset", split.digest):
            return
        with self._store.write("dataset", split.digest, name=split.name, split=split.split) as attempt:
            records.write_pairs(pairs, attempt.directory / "pairs.jsonl")
            attempt.info["rows"] = len(pairs)


def _source_fields(spec: DatasetSpec) -> dict[str, object]:
    return {"id": spec.source, "revision": spec.revision, "keep": spec.keep}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the known names nearest to a mistyped one, else the list of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names)}."
