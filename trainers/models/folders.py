"""Checks of a model's folder, without torch or transformers: whether it may and can be loaded.

Only safetensors and JSON are read; pickles and Python files only where the user trusts them (specs.Trust).
"""

import functools
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainers.errors import ModelError
from trainers.specs import Trust

PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_TOKENIZER_STARTS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_MODEL_TYPE = re.compile(r'\(\s*"([\w.-]+)",\s*"\w+"')


def require_sound_model(folder: Path, trust: Trust) -> list[Path]:
    """Return the weight files. Raises ModelError if they, the configuration or the tokenizer are unsound."""
    weights = weight_files(folder, trust)
    config = _json_object(folder / "config.json")
    _require_known_architecture(config, folder, trust)
    _require_config_of(config, weights, folder)
    _require_tokenizer(folder)
    return weights


def weight_files(folder: Path, trust: Trust) -> list[Path]:
    """Return safetensors files, or else pickles if they are allowed. Raises ModelError."""
    for single, patterns in (("model.safetensors", ("*.safetensors",)), (PICKLES[0], PICKLES)):
        found = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if found and patterns is PICKLES and not trust.allow_pickle:
            raise ModelError(
                f"{folder} holds no safetensors weights; {found[0].name} is a pickle, which can run any code of its "
                "author. Convert it, or say --allow-pickle if you trust it."
            )
        if found:
            whole = (folder / single).is_file()
            return found if whole else _complete(found, folder / f"{single}.index.json")
    raise ModelError(f"{folder} holds no safetensors weights, and no other format is read.")


def _complete(shards: list[Path], index: Path) -> list[Path]:
    """Return the shards. Raises ModelError if their index names another file; a single file needs no index."""
    if not index.is_file():
        if len(shards) == 1:
            return shards
        raise ModelError(f"{index.parent} holds {len(shards)} files of weights, but no {index.name}.")
    named = _json_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ModelError(f"{index} has no weight_map of names to files; fetch the model again.")
    absent = sorted(set(named.values()) - {shard.name for shard in shards})
    if absent:
        raise ModelError(f"{index} names {absent[0]!r}, which is not in its folder; fetch the model again.")
    return shards


def code_files(folder: Path) -> list[Path]:
    """Return the Python files in a model's folder, which `trust_remote_code` may run."""
    return sorted(file for file in folder.rglob("*.py") if file.is_file())


def require_own_code(config: dict[str, Any], location: str) -> None:
    """Raise ModelError if the config names code of another repository, which no key covers."""
    named = config.get("auto_map")
    values = named.values() if isinstance(named, dict) else ()
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    foreign = [text for text in texts if isinstance(text, str) and "--" in text]
    if foreign:
        raise ModelError(
            f"{location}: its auto_map names code of another repository ({foreign[0]}), of which no revision is known; "
            "copy the code into the model's folder."
        )


def _require_known_architecture(config: dict[str, Any], folder: Path, trust: Trust) -> None:
    require_own_code(config, str(folder))
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{folder / 'config.json'} names no model_type.")
    if kind in _known_model_types() or (trust.trust_remote_code and "auto_map" in config):
        return
    if "auto_map" in config:
        raise ModelError(
            f"{folder}: {kind!r} is defined by Python files of its own, which can run any code of their author. "
            "Read them, then say --trust-remote-code."
        )
    raise ModelError(f"{folder / 'config.json'}: model_type {kind!r} is not known to transformers.")


@functools.cache
def _known_model_types() -> frozenset[str]:
    """Return the types in transformers' own table, read as text: importing the library takes seconds."""
    spec = importlib.util.find_spec("transformers")
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    table = (folder / "models" / "auto" / "auto_mappings.py").read_text(encoding="utf-8")
    return frozenset(_MODEL_TYPE.findall(table.partition("CONFIG_MAPPING_NAMES")[2])) | {"gpt-sw3"}


def _require_config_of(config: dict[str, Any], weights: Sequence[Path], folder: Path) -> None:
    """Raise ModelError if the configuration does not fit these weights."""
    file = folder / "config.json"
    named = config.get("transformers_weights")
    if named is not None and named not in {weight.name for weight in weights}:
        raise ModelError(f"{file}: transformers_weights {named!r} is no file of weights here.")
    for name in _SIZES:
        value = config.get(name, 1)
        # Some architectures give one value per layer.
        if not isinstance(value, list) and (type(value) is not int or value < 1):
            raise ModelError(f"{file}: {name} is {value!r}, not a positive integer.")
    vocabulary, width, layers = map(config.get, ("vocab_size", "hidden_size", "num_hidden_layers"))
    last_layer = -1
    for name, shape in _shapes(weights).items():
        embeddings = name.endswith("embed_tokens.weight") and None not in (vocabulary, width)
        if embeddings and shape != [vocabulary, width]:
            raise ModelError(
                f"{folder}: config.json says vocab_size {vocabulary} and hidden_size {width}, "
                f"but {name} is {' × '.join(map(str, shape))}."
            )
        if match := _LAYER.search(name):
            last_layer = max(last_layer, int(match[1]))
    if last_layer >= 0 and isinstance(layers, int) and layers > last_layer + 1:
        raise ModelError(
            f"{folder}: config.json says num_hidden_layers {layers}, but there are weights for {last_layer + 1}."
        )


def _shapes(weights: Iterable[Path]) -> dict[str, list[int]]:
    """Return shapes by tensor name, skipping pickles; safetensors checks its header and offsets against the file."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in weights:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="np") as opened:
                shapes.update({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{file} is damaged or no safetensors file: {error}; fetch it again.") from error
    return shapes


def _require_tokenizer(folder: Path) -> None:
    names = [file.name for file in folder.iterdir() if file.is_file()]
    if not any(
        name.startswith(_TOKENIZER_STARTS) or name.endswith((".model", ".tiktoken")) for name in names
    ):
        raise ModelError(f"{folder} holds no tokenizer (tokenizer.json or the like).")
    for name in (*_OBJECTS, "generation_config.json"):
        if (folder / name).is_file():
            _json_object(folder / name)
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        _json_object(file)
        try:
            Tokenizer.from_file(str(file))
        # The library raises nothing more precise.
        except Exception as error:
            raise ModelError(f"{file} is no tokenizer: {error}.") from error


def _json_object(file: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{file} must hold an object, not a {type(loaded).__name__}.")
    return loaded
