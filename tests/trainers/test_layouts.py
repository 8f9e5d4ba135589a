"""Which layout each architecture gets, tried on a tiny model of its kind; what is wrong in any layout is refused."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.trainers import naive
from tests.trainers.architectures import (
    SPECS,
    VOCABULARY,
    load_untrained,
    random_pairs,
    small_tokenizer,
    word_tokenizer,
)
from trainers.errors import ModelError
from trainers.evaluate.scoring import scoring_batches
from trainers.models import layouts
from trainers.models.attention import shared_tokens
from trainers.models.layouts import layout_of, settle_layout
from trainers.models.loading import load_model
from trainers.models.reward_parts import RewardModule
from trainers.models.unembedding import Unembedding
from trainers.pairs.packing import collate
from trainers.train.engine import _checkpoint_activations
from trainers.train.loop import _validated

CONV = ["conv", "conv", "full_attention", "conv"]
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [2.0 + i for i in range(48)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# What the config says beside the architecture's defaults, and what it gets: a layout, or what the refusal says.
EXPECTED = [
    ("llama", {}, "packed"),
    ("llama", {"is_causal": False}, "looks ahead"),
    ("llama", {"rope_parameters": DYNAMIC}, "packed"),
    ("qwen2", {}, "packed"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 10}, "packed"),
    ("gemma2", {}, "packed"),
    ("gpt_neox", {}, "packed"),
    ("mistral", {}, "packed"),
    ("mistral", {"is_causal": False}, "looks ahead"),
    ("qwen3", {}, "packed"),
    ("qwen3_moe", {}, "packed"),
    ("qwen3_next", {}, "rows"),
    ("gemma3_text", {}, "packed"),
    ("gemma3", {}, "packed"),
    ("gemma3n_text", {}, "packed"),
    ("phi", {}, "packed"),
    ("phi3", {"sliding_window": 2047}, "packed"),
    ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 131072}, "packed"),
    ("falcon", {"rope_parameters": DYNAMIC}, "rows"),
    ("olmo2", {}, "packed"),
    ("mixtral", {}, "packed"),
    ("gpt2", {}, "packed"),
    ("opt", {}, "packed"),
    ("biogpt", {}, "rows"),
    ("bloom", {}, "rows"),
    ("mpt", {}, "rows"),
    ("falcon", {}, "rows"),
    ("falcon", {"alibi": True}, "rows"),
    ("gptj", {}, "rows"),
    ("gpt_oss", {}, "packed"),
    ("exaone4", {}, "packed"),
    ("doge", {}, "rows"),
    ("lfm2", {"num_hidden_layers": 16, "layer_types": CONV * 4}, "rows"),
    ("granite", {}, "packed"),
    ("granite", {"logits_scaling": 6.0}, "packed"),
    ("cohere", {}, "packed"),
    ("cohere2", {"logit_scale": 1.0}, "packed"),
    ("deepseek_v3", {}, "packed"),
    ("smollm3", {}, "packed"),
    ("mamba", {}, "rows"),
    ("rwkv", {}, "rows"),
    ("recurrent_gemma", {}, "rows"),
    ("modernbert-decoder", {}, "not its unembedding applied"),
    ("jamba", {}, "rows"),
    ("bert", {}, "looks ahead"),
]


def without_weights(model_type, options):
    """A model of the real size of its config, on no device at all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    if isinstance(model.get_output_embeddings(), torch.nn.Linear):
        model.get_output_embeddings().__class__ = Unembedding
    return model


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    EXPECTED,
    ids=[f"{name}-{'-'.join(options)}".rstrip("-") for name, options, _ in EXPECTED],
)
def test_what_an_architecture_gets(model_type, options, expected):
    model = without_weights(model_type, options)
    if expected not in ("packed", "rows"):
        with pytest.raises(ModelError, match=expected):
            settle_layout(model, "here")
        return
    settle_layout(model, "here")
    assert layout_of(model) == expected


def saved(folder, model_type, **options):
    """A small model as its architecture initialises it, with the tokenizer of the tests."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            **options,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("output", ["head", "unembedding"])
def test_a_llama_that_looks_ahead_is_refused_by_name(tmp_path, output):
    saved(tmp_path, "llama", is_causal=False)
    with pytest.raises(ModelError, match=r"a LlamaFor\w+ .*looks ahead"):
        load_untrained(tmp_path, output)


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("llama", {}, (1.0, None)),
        ("cohere", {"logit_scale": 0.0625}, (0.0625, None)),
        ("granite", {"logits_scaling": 6.0}, (1 / 6, None)),
        ("minicpm3", {"hidden_size": 2560, "dim_model_base": 256}, (0.1, None)),
        ("gemma2", {"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ("recurrent_gemma", {"logits_soft_cap": 30.0}, (1.0, 30.0)),
    ],
)
def test_scale_and_cap_of_logits_are_those_of_the_real_config(model_type, options, expected):
    model = without_weights(model_type, options)
    settle_layout(model, "here")
    layer = model.get_output_embeddings()
    scale, softcap = expected
    assert layer.scale == pytest.approx(scale, rel=1e-9)
    assert layer.softcap == (softcap and pytest.approx(softcap, rel=1e-9))


def test_rows_that_are_computed_alone_are_refused_under_zero_3():
    model = without_weights("doge", {})
    settle_layout(model, "here")
    next(model.parameters()).ds_id = 0
    with pytest.raises(ModelError, match=r"DogeForCausalLM is computed row by row, which ZeRO 3 cannot"):
        RewardModule(model, SPECS["im_rm_no_reference"])(collate(random_pairs(), layout="rows"))


def test_weights_that_hide_a_convolution_do_not_make_a_model_packed(tmp_path, caplog):
    saved(tmp_path, "lfm2", layer_types=["conv", "full_attention"], initializer_range=1e-4)
    with caplog.at_level(logging.WARNING):
        assert layout_of(load_untrained(tmp_path, "unembedding")) == "rows"
    assert "other hidden states" in caplog.text


def test_a_model_that_knows_tokens_by_more_than_their_rows_gets_no_new_ones(tmp_path):
    saved(
        tmp_path,
        "gemma3n_text",
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        head_dim=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.5, 0.0],
    )
    load_untrained(tmp_path, "unembedding")
    longer = word_tokenizer([f"w{i}" for i in range(VOCABULARY + 2)], unk_token="w0", eos_token="w1")
    with pytest.raises(ModelError, match=r"Gemma3nForCausalLM.*cannot be given rows"):
        load_model(str(tmp_path), tokenizer=longer, output="unembedding", precision="fp32")


def test_a_model_that_does_not_run_is_refused_for_that_where_its_tokenizer_has_new_tokens(
    tmp_path, monkeypatch
):
    def fails(model):
        raise ValueError("no such layer")

    saved(tmp_path, "llama")
    monkeypatch.setattr(layouts, "tiny_copy", fails)
    longer = word_tokenizer([f"w{i}" for i in range(VOCABULARY + 2)], unk_token="w0", eos_token="w1")
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*does not run \(ValueError: no such layer\)"):
        load_model(str(tmp_path), tokenizer=longer, output="unembedding", precision="fp32")


def test_trying_touches_neither_random_numbers_nor_the_default_type():
    state = torch.random.get_rng_state()
    model = without_weights("qwen3", {"hidden_size": 2048})
    torch.random.set_rng_state(state)
    settle_layout(model, "here")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_a_kind_of_model_is_tried_once(monkeypatch):
    settle_layout(without_weights("llama", {}), "here")
    monkeypatch.setattr(layouts, "_tried", lambda *arguments: pytest.fail("tried again"))
    settle_layout(without_weights("llama", {}), "there")


# Shorter than some rows of `random_pairs`, and longer than others.
ORIGINAL_LENGTH = 11
ROPES = {
    "dynamic": ("llama", {"max_position_embeddings": ORIGINAL_LENGTH, "rope_parameters": DYNAMIC}),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": ORIGINAL_LENGTH,
            "max_position_embeddings": 40,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": ORIGINAL_LENGTH,
                "short_factor": [1.0, 1.5, 1.0, 2.0],
                "long_factor": [3.0, 5.0, 7.0, 2.0],
            },
        },
    ),
}


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("rope", ROPES)
def test_ropes_that_depend_on_length_take_each_row_alone(tmp_path, rope, layout):
    model_type, options = ROPES[rope]
    saved(tmp_path, model_type, initializer_range=0.4, **options)
    spec, pairs = SPECS["im_rm_no_reference"], random_pairs()
    lengths = [len(pair.prompt + response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    assert min(lengths) <= ORIGINAL_LENGTH < sorted(lengths)[-2]
    model = load_untrained(tmp_path, "unembedding")
    assert layout_of(model) == "packed"
    assert shared_tokens(model) == ORIGINAL_LENGTH
    if layout == "rows":
        model.set_attn_implementation("sdpa")
    reward = RewardModule(model, spec).eval()
    _checkpoint_activations(reward, zero_stage=0)
    found = reward(collate(pairs, layout=layout, shared_tokens=ORIGINAL_LENGTH, pad_id=3))
    found.loss_P.sum().backward()

    def plain():
        # Anew for each row: transformers' own goes on with the frequencies of a longer one.
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    gradient = 0
    for number, pair in enumerate(pairs):
        chosen, rejected = ((plain(), pair.prompt, response) for response in (pair.chosen, pair.rejected))
        sums = [naive.log_prob_sum(*row) for row in (chosen, rejected)]
        for side, ours in zip(sums, found[:2], strict=True):
            assert float(ours.detach()[number]) == pytest.approx(spec.beta * float(side.detach()), rel=1e-5)
        torch.nn.functional.softplus(-spec.beta * (sums[0] - sums[1])).backward()
        gradient += sum(model.get_input_embeddings().weight.grad for model, *_ in (chosen, rejected))
    difference = model.get_input_embeddings().weight.grad - gradient
    assert float(difference.norm()) <= 1e-4 * float(gradient.norm())


def test_a_model_is_searched_for_ropes_once_a_scoring_not_once_a_batch(monkeypatch):
    searched = []
    monkeypatch.setattr("trainers.evaluate.scoring.shared_tokens", searched.append)
    monkeypatch.setattr("trainers.evaluate.scoring.scoring_groups", lambda pairs: [[pair] for pair in pairs])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2))
    assert len(list(scoring_batches(model, random_pairs()))) == 4
    assert searched == [model]


# What their configs call the dropouts that are on unless something turns them off.
DROPPING = {
    "opt": {
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "layerdrop": 0.5,
    },
    "biogpt": {
        "hidden_dropout_prob": 0.5,
        "attention_probs_dropout_prob": 0.5,
        "activation_dropout": 0.5,
        "layerdrop": 0.5,
    },
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "phi": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "xglm": {
        "attention_heads": 4,
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "activation_dropout": 0.5,
        "ffn_dim": 48,
        "layerdrop": 0.5,
    },
    "mixtral": {"num_key_value_heads": 2, "attention_dropout": 0.5, "router_jitter_noise": 0.5},
}


@pytest.mark.parametrize("zero_stage", [0, 3], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", DROPPING)
def test_nothing_is_dropped_where_activations_are_recomputed(model_type, zero_stage):
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "pad_token_id": 0,
            **DROPPING[model_type],
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().__class__ = Unembedding
    settle_layout(model, "here")
    module = RewardModule(model, SPECS["im_rm_no_reference"]).eval()
    batch = collate(random_pairs(), layout=layout_of(model))

    def computed():
        module.zero_grad()
        scores = module(batch)
        scores.loss_P.sum().backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        return [scores.chosen_P.detach(), scores.rejected_P.detach(), *map(torch.clone, gradients)]

    expected = computed()
    _checkpoint_activations(module, zero_stage=zero_stage)
    for _ in range(2):
        found = computed()
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))


def test_layers_that_share_keys_and_values_are_not_recomputed_under_zero_3():
    module = RewardModule(without_weights("gemma3n_text", {}), SPECS["im_rm_no_reference"])
    _checkpoint_activations(module, zero_stage=2)
    with pytest.raises(ModelError, match=r"Gemma3nForCausalLM take keys and values from others.*ZeRO 2"):
        _checkpoint_activations(module, zero_stage=3)


def test_layers_still_recompute_after_a_validation(monkeypatch):
    def evaluated(reward, pairs, **options):
        reward.eval()
        return np.ones(1), np.zeros(1)

    monkeypatch.setattr("trainers.train.loop.score_pairs", evaluated)
    model = without_weights("opt", {})
    module = RewardModule(model, SPECS["ex_rm"]).eval()
    _checkpoint_activations(module, zero_stage=0)
    training = [name for name, layer in module.named_modules() if layer.training]
    assert training
    _validated(module, SimpleNamespace(validation=[], reference=None))
    assert [name for name, layer in module.named_modules() if layer.training] == training
