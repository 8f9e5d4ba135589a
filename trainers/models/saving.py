"""Trained models as ordinary Hugging Face folders: safetensors, config, tokenizer with its template.

Everything but the weights is prepared before a training starts, so that no training is lost because its model cannot be saved.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from trainers.data.records import Message
from trainers.errors import ModelError
from trainers.models.adapters import CONFIG, WEIGHTS, adapter_of, merged, saved_name
from trainers.pairs.templates import first_line, padding_token, render
from trainers.storage import disk_named, require_room

_PROBE = " Größe:\t1234567.89 – it's “naïve” (don't), x_y/z <b>\n\n  日本語, привет 🙂 …  "
_PROBE_TOKENS = 500
# AutoTokenizer loads the class of config.json's model type instead of the saved one. With the first of these it reads
# tokenizer.json as it is for most types, with the second for those that are wrong on the hub (qwen2, phi3, …).
_AS_IT_IS: tuple[dict[str, Any], ...] = (
    {"tokenizer_class": "TokenizersBackend"},
    {"tokenizer_class": "TokenizersBackend", "auto_map": {"AutoTokenizer": [None, None]}},
)


def full_weights(model: nn.Module, *, adapter: bool = False) -> dict[str, torch.Tensor]:
    """Return every parameter and persistent buffer on the CPU, gathered from ZeRO-3's partitions; tied ones once.

    With `adapter`, return only the adapter's, under peft's names; else an adapter is merged. A collective: every rank
    calls it, rank 0 gets the weights.
    """
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if adapter and not parameter.requires_grad:
            continue
        gathered = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
            if torch.distributed.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    if adapter:
        return {saved_name(name): weight for name, weight in weights.items()}
    if torch.distributed.get_rank() == 0:
        weights |= {name: buffer.cpu().clone() for name, buffer in persistent_buffers(model).items()}
    return merged(model, weights) if adapter_of(model) else weights


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that must be saved: bias corrections of a router, scalars of a layer, …"""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def save_model(weights: Mapping[str, torch.Tensor], files: Mapping[str, bytes], out_dir: Path) -> None:
    """Write a model's folder, weights first. Raises StorageError if there is no room."""
    need = sum(weight.numel() * weight.element_size() for weight in weights.values())
    need += sum(map(len, files.values()))
    require_room(out_dir, need)
    with disk_named(out_dir, need):
        out_dir.mkdir(parents=True)
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        name = WEIGHTS if CONFIG in files else "model.safetensors"
        save_file(contiguous, out_dir / name, metadata={"format": "pt"})
        for name, content in files.items():
            (out_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (out_dir / name).write_bytes(content)


def folder_files(model: Any, tokenizer: Any, *, adapter: bool = False) -> dict[str, bytes]:
    """Return the files of the model's (or adapter's) folder, without weights and card. Raises ModelError.

    The pad token is one with which no response ends.
    """
    with tempfile.TemporaryDirectory() as name, disk_named(Path(name)):
        # Always the same name: transformers caches a model's code under the name of its folder.
        folder = Path(name) / "model"
        try:
            folder.mkdir()
            if adapter:
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_token(tokenizer))
                adapter_of(model).save_pretrained(str(folder))
            else:
                _write_configs(model, tokenizer, folder)
            tokenizer.save_pretrained(folder)
            settle_tokenizer(tokenizer, folder, trusted=bool(getattr(model, "_auto_class", None)))
        except ModelError:
            raise
        # A model's own code may raise anything.
        except Exception as error:
            raise ModelError(
                f"{tokenizer.name_or_path} can be loaded, but not saved again ({first_line(error)}), so its training "
                "would be lost; use another model."
            ) from error
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }


def _write_configs(model: Any, tokenizer: Any, folder: Path) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    pad_id = padding_token(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.padding_side = "right"
    model.config.architectures = [type(model).__name__]
    model.config.pad_token_id = pad_id
    if getattr(model, "_auto_class", None):
        # The weights need the trusted code to be loaded, so it is saved, too.
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.pad_token_id = pad_id
        # save_pretrained refuses the settings of many models on the hub, such as a temperature without sampling.
        model.generation_config.to_json_file(
            folder / "generation_config.json", keys_to_pop=["compile_config"]
        )


def settle_tokenizer(tokenizer: Any, folder: Path, *, trusted: bool = False) -> None:
    """Make sure that AutoTokenizer loads from `folder` a tokenizer that gives the same ids. Raises ModelError."""
    from transformers import AutoTokenizer

    trusted = trusted or bool(tokenizer._auto_class)
    known = sorted(tokenizer.get_vocab().values())
    words = tokenizer.decode(known[:: len(known) // _PROBE_TOKENS + 1])
    expected, file = _ids(tokenizer, words), folder / "tokenizer_config.json"
    said = ""
    for change in ({}, *_AS_IT_IS):
        if change:
            file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **change}, indent=2), "utf-8")
        try:
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            if _ids(found, words) == expected:
                return
            said = said or f"{type(found).__name__} gives other ids"
        # Any error means that it is not the same tokenizer.
        except Exception as error:
            said = said or f"{type(error).__name__}: {first_line(error)}"
    raise ModelError(
        f"the tokenizer of {tokenizer.name_or_path or folder} is another one once it is saved and loaded again: {said}. "
        "Rewards of the saved model would be of other tokens; give the model a tokenizer that AutoTokenizer can save "
        "and load."
    )


def _ids(tokenizer: Any, words: str) -> list[list[int] | None]:
    """Return ids that must not change: of padding, a text as a user encodes it, a conversation, and `words`."""
    turns = (Message("user", _PROBE), Message("assistant", _PROBE))
    chat = render(tokenizer, turns, add_generation_prompt=False)
    found: list[list[int] | None] = [[tokenizer.pad_token_id]]
    for text, special in ((_PROBE, True), (chat, False), (words, False)):
        try:
            found.append(tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"])
        # tokenizers raises nothing more precise where it cannot encode every character.
        except Exception:
            found.append(None)
    return found
