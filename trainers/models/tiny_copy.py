"""A tiny random model of the same class and a scaled-down config, for trying properties of an architecture.

Layers, widths, vocabulary, windows and lengths are found by their names in configs; every kind of layer stays. Weights
are random and not zero, so that every part has an effect; all arithmetic is in float64.
"""

import copy
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Special tokens are below or above the ordinary ones.
VOCABULARY = 128
ORDINARY_TOKENS = range(24, 120)
# Trial rows are longer than these, so that windows, chunks and ropes for long rows take effect.
WINDOW = 4
ROPE_LENGTH = 12
_POSITIONS = 64
_LAYERS, _HEADS, _HEAD_DIM = 4, 4, 16
_WIDTH = _HEADS * _HEAD_DIM

# Value of an integer in the tiny config, by the first pattern in its name. Others stay.
_INTEGERS: tuple[tuple[int, str], ...] = (
    (ROPE_LENGTH, r"original_max_position"),
    (
        _POSITIONS,
        r"max_position|n_positions|max_seq_len|n_ctx|context_length|target_positions|model_max_length",
    ),
    (64, r"ngram_vocab|hash.*vocab"),
    (VOCABULARY, r"vocab_size"),
    (
        WINDOW,
        r"window|chunk_(size|length)|chunk_len|local_attention|floor|keep_|index_topk$|extent|^block_size$",
    ),
    (99, r"moe_layer_end_index"),
    (
        2,
        r"index_(topk_blocks|block_size)|_period$|_interval$|_pattern$|every_n|group_size$|first_k_dense|"
        r"num_dense_layers|decoder_sparse_step|num_kv_shared_layers|per_tok|topk$|moe_k$|n_?groups",
    ),
    (1, r"_offset$|layer_start|topk_group|n_group$|num_expert_group|shared_experts?$"),
    (_LAYERS, r"(num|n)_(hidden_|decoder_|encoder_)?layers?$|^(de|en)coder_layers$|^num_blocks$"),
    (2 * _HEAD_DIM, r"qk_head_dim"),
    (_HEAD_DIM, r"head_?dim$|d_head$|head_size$|dim_head$|kv_channels$|^d_rel$"),
    (8, r"rotary_dim|lora_rank|laurel_rank|_lowrank|(adapter|norm|dt|step)_rank|state_size|d_state"),
    (4, r"experts$|expert_num$|num_expert$"),
)


class Wide(TorchFunctionMode):
    """Replaces float32, in which transformers computes norms and ropes, by float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        named = {
            name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()
        }
        if func in (torch.tensor, torch.full) and args and isinstance(args[-1], float):
            named.setdefault("dtype", torch.float64)
        return func(*args, **named)


def tiny_copy(model: Any) -> Any:
    """Make a tiny random model of the class of `model`, on the CPU, in evaluation mode."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    _scale(config)
    # Only the CPU's generator: using a GPU's would initialise CUDA.
    with torch.random.fork_rng(devices=[]), Wide():
        torch.default_generator.manual_seed(0)
        tiny = type(model)(config).double().eval()
    _randomise(tiny)
    return tiny


def _scale(config: Any) -> None:
    """Make the model of `config` tiny."""
    from transformers import PreTrainedConfig

    # Bypass the setters, which would check each change against values not scaled yet.
    values = vars(config)
    # torch's grouped matrix product of experts knows no float64.
    values["_experts_implementation_internal"] = "eager"
    heads, width, layers = (
        values.get(config.attribute_map.get(name, name))
        for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    kept = _kept_layers(values, layers)
    for name, value in list(values.items()):
        if isinstance(value, PreTrainedConfig):
            _scale(value)
        elif isinstance(value, list) and len(value) == layers:
            values[name] = [_integer(name, value[layer], heads, width) for layer in kept]
        elif isinstance(value, list) and re.search(r"(layer_ids|idxs|indices|layers)$", name):
            values[name] = [kept.index(layer) for layer in value if layer in kept]
        else:
            values[name] = _integer(name, value, heads, width)
    if kept:
        values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    _scale_mamba(values)
    rope = values.get("rope_parameters") or {}
    for part in rope.values() if all(isinstance(part, dict) for part in rope.values()) else [rope]:
        _scale_rope(values, part)


def _kept_layers(values: dict[str, Any], layers: Any) -> list[int]:
    """Return the first four layers, or the first and last of each kind if lists of the config give kinds."""
    if not isinstance(layers, int):
        return []
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == layers]
    # Floats only scale something.
    kinds = [value for value in lists if not isinstance(value[0], float)]
    if not kinds or layers <= _LAYERS:
        return list(range(min(layers, _LAYERS)))
    named = [str([value[layer] for value in kinds]) for layer in range(layers)]
    first = {kind: layer for layer, kind in reversed(list(enumerate(named)))}
    last = {kind: layer for layer, kind in enumerate(named)}
    return sorted({*first.values(), *last.values()})


def _integer(name: str, value: Any, heads: Any, width: Any) -> Any:
    """Scale an integer of the config; return anything else unchanged."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.search(r"_(id|index|ids)$", name) and "altup" not in name:
        return value if value < ORDINARY_TOKENS.start else VOCABULARY - 1
    if re.search(r"heads?$|heads_per_layer$|query_groups$", name):
        if value == 1 or heads is None:
            return min(value, 2 * _HEADS)
        return _HEADS if value == heads else _HEADS // 2 if value < heads else 2 * _HEADS
    for scaled, pattern in _INTEGERS:
        if re.search(pattern, name):
            return scaled if scaled in (VOCABULARY, _POSITIONS) else min(value, scaled)
    if not re.search(r"size|dim|width|inner|embd|model|rank|ff", name):
        return value
    if isinstance(width, int) and value >= width and value % width == 0:
        return value // width * _WIDTH
    return min(value, _WIDTH)


def _scale_mamba(values: dict[str, Any]) -> None:
    """Make heads times their width the inner width of a Mamba layer."""
    heads = values.get("mamba_n_heads") or values.get("n_mamba_heads")
    for name in ("mamba_d_head", "mamba_headdim"):
        if heads and name in values:
            values[name] = values["mamba_expand"] * _WIDTH // heads
            if values.get("mamba_d_ssm"):
                values["mamba_d_ssm"] = heads * values[name]


def _scale_rope(values: dict[str, Any], rope: dict[str, Any]) -> None:
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = ROPE_LENGTH
    if rope.get("rope_type") == "dynamic":
        values["max_position_embeddings"] = ROPE_LENGTH
    head_dim = values.get("head_dim") or _HEAD_DIM
    pairs = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if name in rope:
            rope[name] = [rope[name][number * len(rope[name]) // pairs] for number in range(pairs)]
    if isinstance(rope.get("mrope_section"), list):
        parts = len(rope["mrope_section"])
        rope["mrope_section"] = [pairs - pairs // parts * (parts - 1)] + [pairs // parts] * (parts - 1)


def _randomise(model: nn.Module) -> None:
    """Draw weights, gates and biases so large that attention is sharp and every part affects the output."""
    generator = torch.Generator().manual_seed(0)
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        # A buffer of different values is a table that the architecture needs; one of a single value is learned.
        if not tensor.is_floating_point() or (
            name not in learned and not bool((tensor == tensor.flatten()[:1]).all())
        ):
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if tensor.dim() < 2:
            tensor += 0.3 * noise
        else:
            tensor.copy_(noise * 1.5 / math.sqrt(tensor.shape[-1]))
