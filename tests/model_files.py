"""Model files of a few kilobytes, sound in every header; nothing in them was trained, and no torch writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, WIDTH = 8, 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tokenizer_json(first: str = "a") -> str:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate([first, "b", "c", "d", "e", "f", "g", "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


def write_model(folder: Path, *, seed: int = 0, tokenizer: str = "a", **config: Any) -> Path:
    """config.json with changes, safetensors, tokenizer.json."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer.json").write_text(tokenizer_json(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    draw = np.random.default_rng(seed)
    names = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.layers.0.mlp.up_proj.weight": (8, WIDTH),
    }
    weights = {name: draw.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gguf(file: Path) -> Path:
    """Two tensors, a vocabulary and a few numbers."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list("abcdefgh"))
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_tensor("token_embd.weight", np.ones((VOCABULARY, WIDTH), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
