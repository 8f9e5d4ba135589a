"""A model's folder judged by its files, without torch or transformers: what may be loaded, and whether it can be.

Only safetensors and JSON are read; pickles and Python files only where the user trusts them (specs.Trust).
"""

import functools
import importlib.util
import json
import re
from collections.abc import Iterable
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
    """The files that hold the weights. Raises ModelError where they, the configuration or the tokenizer are unsound."""
    weights = weight_files(folder, trust)
    config = _json_object(folder / "config.json")
    _require_known_architecture(config, folder, trust)
    _require_named_weights(config, weights, folder)
    _require_sizes(config, folder)
    shapes = _shapes(weights)
    if shapes:
        _require_fit(config, shapes, folder)
    _require_tokenizer(folder)
    return weights


def weight_files(folder: Path, trust: Trust) -> list[Path]:
    """Safetensors, or pickles where there are none and they are allowed. Raises ModelError."""
    found = sorted(folder.glob("*.safetensors"))
    if found:
        index = folder / "model.safetensors.index.json"
        return found if (folder / "model.safetensors").is_file() else _complete(found, index)
    pickles = sorted(file for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        raise ModelError(f"{folder} holds no safetensors weights, and no other format is read.")
    if not trust.allow_pickle:
        raise ModelError(
            f"{folder} holds no safetensors weights; {pickles[0].name} is a pickle, which can run any code of its "
            "author. Convert it, or say --allow-pickle if you trust it."
        )
    index = folder / "pytorch_model.bin.index.json"
    return pickles if (folder / "pytorch_model.bin").is_file() else _complete(pickles, index)


def _complete(shards: list[Path], index: Path) -> list[Path]:
    """The shards, once the index of them names no other file; one lone file needs none."""
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
    """The Python files in a model's folder, which `trust_remote_code` may run."""
    return sorted(file for file in folder.rglob("*.py") if file.is_file())


def require_own_code(config: dict[str, Any], location: str) -> None:
    """Refuse code of another repository, which no key covers. Raises ModelError."""
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
    """Read off transformers' own table: importing the library takes seconds."""
    spec = importlib.util.find_spec("transformers")
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    table = (folder / "models" / "auto" / "auto_mappings.py").read_text(encoding="utf-8")
    return frozenset(_MODEL_TYPE.findall(table.partition("CONFIG_MAPPING_NAMES")[2])) | {"gpt-sw3"}


def _require_named_weights(config: dict[str, Any], weights: Iterable[Path], folder: Path) -> None:
    named = config.get("transformers_weights")
    if named is not None and named not in {file.name for file in weights}:
        raise ModelError(
            f"{folder / 'config.json'}: transformers_weights {named!r} is no file of weights here."
        )


def _require_sizes(config: dict[str, Any], folder: Path) -> None:
    for name in _SIZES:
        value = config.get(name, 1)
        # Some architectures give one value per layer.
        if not isinstance(value, list) and (type(value) is not int or value < 1):
            raise ModelError(f"{folder / 'config.json'}: {name} is {value!r}, not a positive integer.")


def _shapes(weights: Iterable[Path]) -> dict[str, list[int]]:
    """Shapes by tensor name; safetensors checks its header and offsets against the file. Empty for pickles."""
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


def _require_fit(config: dict[str, Any], shapes: dict[str, list[int]], folder: Path) -> None:
    vocabulary, width, layers = (
        config.get(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")
    )
    for name, shape in shapes.items():
        if (
            name.endswith("embed_tokens.weight")
            and None not in (vocabulary, width)
            and shape != [vocabulary, width]
        ):
            raise ModelError(
                f"{folder}: config.json says vocab_size {vocabulary} and hidden_size {width}, "
                f"but {name} is {' × '.join(map(str, shape))}."
            )
    numbers = [int(match[1]) for name in shapes if (match := _LAYER.search(name))]
    if numbers and isinstance(layers, int) and layers > max(numbers) + 1:
        raise ModelError(
            f"{folder}: config.json says num_hidden_layers {layers}, but there are weights for {max(numbers) + 1}."
        )


def _require_tokenizer(folder: Path) -> None:
    names = [file.name for file in folder.iterdir() if file.is_file()]
    if not any(
        name.startswith(_TOKENIZER_STARTS) or name.endswith((".model", ".tiktoken")) for name in names
    ):
        raise ModelError(f"{folder} holds no tokenizer (tokenizer.json or the like).")
    for name in (*_OBJECTS, "generation_config.json"):
        if (folder / name).is_file():
            _json_object(folder / name)
    if (folder / "tokenizer.json").is_file():
        _require_tokenizer_json(folder / "tokenizer.json")


def _require_tokenizer_json(file: Path) -> None:
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
