"""Tiny random models of every architecture that rmsweep knows, and of one that goes through the probe."""

import functools
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trainers.models.loading import load_model
from trainers.models.saving import persistent_buffers
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec

VOCABULARY = 64
YES, NO = 40, 41
# Shorter than the prompts of `random_pairs`.
WINDOW = 4
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
_GQA = {"num_key_value_heads": 2}
_CAPPED = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
# name → (model type, what it has beside _SHAPE)
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GQA, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_GQA, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_GQA, "tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {**_GQA, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_GQA, **_CAPPED, "tie_word_embeddings": False}),
    "gemma2-tied": ("gemma2", {**_GQA, **_CAPPED, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}),
    "mistral": ("mistral", {**_GQA, "sliding_window": WINDOW, "tie_word_embeddings": False}),
}
ARCHITECTURES = tuple(_MODELS)
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
# Models that need more than their parameters: bias corrections of routers, scalars of layers, constants of activations.
_BUFFERED: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", _GQA),
    "axk1": ("axk1", {**_EXPERTS, **_LATENT, "n_routed_experts": 4}),
    "deepseek_v3": ("deepseek_v3", {**_EXPERTS, **_LATENT, "n_routed_experts": 4}),
    "gemma4": ("gemma4_text", {**_GQA, "head_dim": 8, "vocab_size_per_layer_input": VOCABULARY}),
    "glm4_moe": ("glm4_moe", {**_EXPERTS, **_GQA, "head_dim": 8, "n_routed_experts": 4}),
    "minimax_m2": ("minimax_m2", {**_EXPERTS, **_GQA, "head_dim": 8, "num_local_experts": 4}),
}
BUFFERED = tuple(_BUFFERED)
SPECS = {
    spec.name: spec
    for spec in (
        RewardSpec(kind="ex_rm"),
        RewardSpec(kind="ex_rm", pooling="mean"),
        RewardSpec(kind="im_rm", beta=0.1),
        RewardSpec(kind="im_rm", beta=0.1, reference=False),
        RewardSpec(kind="im_rm_length_normalised", beta=2.0),
        RewardSpec(kind="im_rm_length_normalised", beta=2.0, reference=False),
        RewardSpec(kind="im_rm_logits", beta=0.1),
        RewardSpec(kind="im_rm_hybrid", beta=0.1),
        RewardSpec(kind="im_rm_hybrid", beta=0.1, reference=False),
        RewardSpec(kind="ex_grm"),
    )
}


def word_tokenizer(words: list[str], **specials: str) -> PreTrainedTokenizerFast:
    """One token a word, in the order of `words`, and no chat template."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that has a template and fits the models, so that none gets new rows."""
    tokenizer = word_tokenizer([f"w{i}" for i in range(VOCABULARY)], unk_token="w0", eos_token="w1")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} w1 {% endfor %}"
    return tokenizer


def save_architecture(name: str, folder: Path, seed: int = 0, vocab_size: int = VOCABULARY) -> None:
    """Write the model, which can be loaded with a head too if it is one of ARCHITECTURES, and its tokenizer."""
    model_type, extra = (_MODELS | _BUFFERED)[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {**_SHAPE, **extra, "vocab_size": vocab_size}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape))
        # Norms and biases start as ones and zeros, which would hide what is wrong with them.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn(parameter.shape)
            for buffer in persistent_buffers(model).values():
                buffer += 0.3 * torch.randn(buffer.shape)
        model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)


def load_untrained(folder: Path, output: str, precision: str = "fp32") -> Any:
    """The model as rmsweep loads it, its head drawn from seed 0."""
    head_seed = None if output == "unembedding" else 0
    return load_model(
        str(folder), tokenizer=small_tokenizer(), output=output, precision=precision, head_seed=head_seed
    )


@functools.cache
def load_architecture(folder: Path, output: str) -> Any:
    """The same in fp32 with a larger head, shared between tests: copy it to change it."""
    model = load_untrained(folder, output)
    if output != "unembedding":
        # So that rewards differ visibly.
        model.score.weight.data *= 20
    return model


def random_pairs(kind: str = "im_rm", count: int = 4, seed: int = 3) -> list[TokenPair]:
    """Pairs of random tokens of many lengths; those of ex_grm end in their answer."""
    source = random.Random(seed)

    def draw(shortest: int, longest: int) -> list[int]:
        return [source.randrange(VOCABULARY) for _ in range(source.randint(shortest, longest))]

    chosen_end, rejected_end = ([YES], [NO]) if kind == "ex_grm" else ([], [])
    shortest = 0 if kind == "ex_grm" else 1
    return [
        TokenPair(
            index=10 * i,
            prompt=draw(WINDOW + 1, 3 * WINDOW),
            chosen=draw(shortest, 7) + chosen_end,
            rejected=draw(shortest, 7) + rejected_end,
        )
        for i in range(count)
    ]
