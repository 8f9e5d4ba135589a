"""Low-rank adapters (LoRA, Hu et al., 2021): add them to a model, save, load and merge them.

peft replaces a linear layer by one that adds the product of two small matrices, A and B. Only these and a reward head are
trained. B starts at 0, so an untrained adapter changes nothing.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainers.errors import ModelError
from trainers.models.attention import backbone
from trainers.pairs.templates import first_line
from trainers.specs import LoraSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_adapter(
    model: Any, lora: LoraSpec, *, base: str, revision: str | None = None, seed: int | None = None
) -> None:
    """Add an untrained adapter to `model`, drawn from `seed`; the model was loaded from `base`. Raises ModelError."""
    from peft import LoraConfig

    found = linear_names(model)
    targets = list(lora.targets or found)
    lora.require_layers(base, found)
    # peft matches the ends of layer names, which may match other layers, too.
    plain = _linear_layers(model)
    others = [name for name, _ in model.named_modules() if _last(name) in targets and name not in plain]
    try:
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            target_modules=targets,
            exclude_modules=others or None,
            base_model_name_or_path=str(Path(base).absolute()) if Path(base).exists() else base,
            revision=revision,
            task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
            modules_to_save=["classifier", "score"] if hasattr(model, "score") else None,
        )
        _inject(model, config, seed or 0)
    except ValueError as error:
        instead = f"name some of --lora-targets {' '.join(found)}"
        raise ModelError(f"{base}: {first_line(error).rstrip('.')}; {instead}.") from error


def linear_names(model: Any) -> list[str]:
    """Return the last name parts of the layers that can take an adapter; the model may be on the meta device."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    # If experts have layers of these names, too, peft would adapt their fused weights instead.
    kept = LoraConfig(target_modules={_last(name) for name in _linear_layers(model)})
    try:
        convert_peft_config_for_transformers(kept, model=model, conversions=None)
    except ValueError as error:
        raise ModelError(f"{type(model).__name__}: {first_line(error)}") from error
    return sorted(kept.target_modules or ())


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _linear_layers(model: Any) -> set[str]:
    """Return the names of the backbone's purely linear layers whose weights no other layer shares."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    inside = {
        id(layer) for layer in backbone(model).modules() if _multiplies(layer) and uses[id(layer.weight)] == 1
    }
    return {name for name, layer in model.named_modules() if id(layer) in inside}


def _multiplies(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # Linear layers with a forward of their own route, quantise or group; Falcon's only multiplies in another order.
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return plain or type(layer) is Conv1D or type(layer).__name__ == "FalconLinear"


def _inject(model: Any, config: Any, seed: int) -> None:
    from peft import inject_adapter_in_model

    # The head stays a plain layer: peft's wrapper would hide it from code that looks for a head.
    saved, config.modules_to_save = config.modules_to_save, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    config.modules_to_save = saved
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    model.peft_config = {"default": config}
    model.eval()


def adapter_of(model: Any) -> Any:
    """Return peft's configuration of a model's adapter, or None."""
    return getattr(model, "peft_config", {}).get("default")


def saved_name(name: str) -> str:
    """Return the name of a trained parameter in peft's files."""
    return "base_model.model." + name.replace(".lora_A.default.", ".lora_A.").replace(
        ".lora_B.default.", ".lora_B."
    )


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the location and revision of an adapter's base model. Raises ModelError."""
    config = _config(folder)
    if not config.base_model_name_or_path:
        raise ModelError(f"{folder / CONFIG} names no base model; fill in base_model_name_or_path.")
    return config.base_model_name_or_path, config.revision


def _config(folder: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error}).") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder / CONFIG} is of a {type(config).__name__}; only LoRA is read.")
    # peft writes true, which would freeze what is read.
    config.inference_mode = False
    return config


def load_adapter(model: Any, folder: Path) -> None:
    """Add the adapter in `folder`, and its head if it has one, to its base model. Raises ModelError."""
    _inject(model, _config(folder), 0)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read ({error}).") from error
    trained = {saved_name(name): item for name, item in model.named_parameters() if item.requires_grad}
    wrong = sorted(trained.keys() ^ weights.keys())
    wrong += [name for name in trained.keys() & weights.keys() if trained[name].shape != weights[name].shape]
    if wrong:
        raise ModelError(
            f"{folder} is not an adapter of this model: {wrong[0]} ({len(wrong)} in all) is not in both."
        )
    with torch.no_grad():
        for name, item in trained.items():
            item.copy_(weights[name])


def merged(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a plain model: those of an adapted one, with the adapter's update added in fp32."""
    from peft.tuners.lora import LoraLayer

    plain = dict(weights)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and f"{name}.base_layer.weight" in plain:
            a, b = (plain.pop(f"{name}.lora_{part}.default.weight").float() for part in "AB")
            update = layer.scaling["default"] * (b @ a)
            base = plain[f"{name}.base_layer.weight"]
            turned = update.T if getattr(layer, "fan_in_fan_out", False) else update
            plain[f"{name}.base_layer.weight"] = (base.float() + turned).to(base.dtype)
    return {name.replace(".base_layer.", "."): weight for name, weight in plain.items()}
