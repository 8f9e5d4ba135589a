"""Which layout each architecture gets, tried on a tiny model of its kind; what is wrong in any layout is refused."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.trainers.architectures import (
    SPECS,
    VOCABULARY,
    random_pairs,
    small_tokenizer,
)
from tests.trainers.trainings import inputs
from trainers.errors import DataError, ModelError
from trainers.evaluate.scoring import scoring_batches
from trainers.models import layouts
from trainers.models.attention import require_short_rows
from trainers.models.layouts import layout_of, settle_layout
from trainers.models.loading import make_rows_for
from trainers.models.reward_parts import RewardModule
from trainers.models.unembedding import Unembedding
from trainers.pairs.packing import collate
from trainers.pairs.tokens import TokenPair
from trainers.train.engine import _checkpoint_activations
from trainers.train.loop import _validated, train

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
    ("qwen2", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 10}, "packed"),
    ("mistral", {}, "packed"),
    ("qwen3_moe", {}, "packed"),
    ("qwen3_next", {}, "rows"),
    ("gemma3", {}, "packed"),
    ("gemma3n_text", {}, "packed"),
    ("phi3", {"sliding_window": 2047}, "packed"),
    ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 131072}, "packed"),
    ("falcon", {"alibi": True}, "rows"),
    ("exaone4", {}, "packed"),
    ("doge", {}, "padded rows it gives other hidden states"),
    ("lfm2", {"num_hidden_layers": 16, "layer_types": CONV * 4}, "rows"),
    ("deepseek_v3", {}, "packed"),
    ("recurrent_gemma", {}, "rows"),
    ("modernbert-decoder", {}, "not its unembedding applied"),
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


def test_only_a_model_that_knows_tokens_by_their_rows_gets_new_ones():
    assert layouts.tokens_are_rows(without_weights("llama", {}))
    model = without_weights("gemma3n_text", {})
    assert not layouts.tokens_are_rows(model)
    with pytest.raises(ModelError, match=r"Gemma3nForCausalLM.*cannot be given rows"):
        make_rows_for(model, range(model.config.vocab_size + 2))


def test_a_kind_of_model_is_tried_once_and_what_fails_is_said(monkeypatch):
    state = torch.random.get_rng_state()
    # Its own config, so that no other test has tried it.
    model = without_weights("qwen3", {"hidden_size": 2048})
    torch.random.set_rng_state(state)
    settle_layout(model, "here")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32

    def fails(model):
        raise ValueError("no such layer")

    monkeypatch.setattr(layouts, "tiny_copy", fails)
    settle_layout(without_weights("qwen3", {"hidden_size": 2048}), "there")
    other = without_weights("qwen3", {"hidden_size": 1024})
    assert layouts.tokens_are_rows(other)
    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM.*does not run \(ValueError: no such layer\)"):
        settle_layout(other, "here")


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
DRIFTING = {
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, 16),
    "longrope": ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 131072}, 4096),
    "none": ("llama", {"max_position_embeddings": 16}, None),
}


@pytest.mark.parametrize(("model_type", "options", "longest"), DRIFTING.values(), ids=DRIFTING)
def test_rows_past_the_length_at_which_a_rope_changes_are_refused(model_type, options, longest):
    model = without_weights(model_type, {"num_hidden_layers": 1, **options})
    pair = TokenPair(index=0, prompt=[1] * 10, chosen=[2], rejected=[3] * ((longest or 99) - 10))
    require_short_rows(model, [pair])
    longer = dataclasses.replace(pair, rejected=[*pair.rejected, 3])
    if longest is None:
        require_short_rows(model, [longer])
        return
    with pytest.raises(DataError, match=f"{longest + 1} tokens .* past {longest} .*--max-response-tokens"):
        next(scoring_batches(model, [longer]))


def test_a_training_refuses_such_rows_before_its_first_step(tmp_path):
    config = AutoConfig.for_model("llama", **SMALL, rope_parameters=DYNAMIC, max_position_embeddings=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    short = TokenPair(index=0, prompt=[5], chosen=[2], rejected=[3])
    long, steps = dataclasses.replace(short, index=1, chosen=[2] * 16), []
    for pairs, validation in (([long], []), ([short], [long])):
        given = inputs(tmp_path, pairs, validation=validation)
        with pytest.raises(DataError, match=r"17 tokens .* past 16"):
            train(given, report=steps.append, out_dir=tmp_path / "out")
    assert not steps


# What their configs call the dropouts that are on unless something turns them off.
DROPPING = {
    "opt": {
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "layerdrop": 0.5,
    },
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "mixtral": {"num_key_value_heads": 2, "attention_dropout": 0.5, "router_jitter_noise": 0.5},
}


@pytest.mark.parametrize("zero_stage", [0, 3], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", DROPPING)
def test_nothing_is_dropped_where_activations_are_recomputed(model_type, zero_stage):
    config = AutoConfig.for_model(model_type, **SMALL, **DROPPING[model_type])
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
