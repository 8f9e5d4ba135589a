"""Every kind of model that is known to work: rewards and gradients are those of plain transformers, whatever the layout.

Each is tiny and random, of its architecture's default config scaled down; what is trained and saved is loaded by plain
transformers. The kinds are those of docs/models.md.
"""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GranitePreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from tests.trainers import naive
from tests.trainers.architectures import SPECS, small_tokenizer
from trainers.models.adapters import merged, saved_name
from trainers.models.layouts import layout_of
from trainers.models.loading import initialise_head, load_model
from trainers.models.reward_parts import RewardModule
from trainers.models.saving import folder_files, persistent_buffers, save_model
from trainers.models.tiny_copy import ORDINARY_TOKENS, WINDOW, Wide, tiny_copy
from trainers.pairs.packing import collate
from trainers.pairs.tokens import TokenPair
from trainers.specs import LoraSpec

# The table of the page.
PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
LAYOUTS = {
    kind: layout
    for layout, kinds in re.findall(r"^\| (packed|rows|rows, one at a time) \| (.+) \|$", PAGE, re.MULTILINE)
    for kind in kinds.split(", ")
}
# What is tried on every change: one of each way to be different.
QUICK = [
    "bloom",
    "cohere2",
    "doge",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "granite",
    "mamba",
    "minicpm3",
    "mixtral",
    "qwen3",
    "stablelm",
]
assert len(LAYOUTS) > 90
NO_HEAD = ("ctrl",)
# Beside the defaults of the architecture's config.
OPTIONS: dict[str, dict[str, object]] = {
    "nemotron": {"num_key_value_heads": 2},
    "gemma4_text": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}

KINDS = [
    pytest.param(kind, layout, id=kind, marks=() if kind in QUICK else pytest.mark.slow)
    for kind, layout in LAYOUTS.items()
]


def random_rows(count=3, seed=7):
    """Pairs of ordinary tokens, longer than the windows of tiny models."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        drawn = torch.randint(len(ORDINARY_TOKENS), (length,), generator=generator).tolist()
        return [ORDINARY_TOKENS[number] for number in drawn]

    return [
        TokenPair(index=n, prompt=draw(WINDOW + 1 + n), chosen=draw(2 * WINDOW - n), rejected=draw(3 + 2 * n))
        for n in range(count)
    ]


def saved(kind, folder):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **OPTIONS.get(kind, {})))
    tiny_copy(model).float().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder, output):
    """The model as rmsweep loads it, then in float64, in which transformers' experts have one implementation."""
    head_seed = 0 if output == "head" else None
    model = load_model(
        str(folder), tokenizer=small_tokenizer(), output=output, precision="fp32", head_seed=head_seed
    )
    if output == "head":
        initialise_head(model, 1)
        model.score.weight.data *= 20
    return wide(model)


def wide(model):
    model.set_experts_implementation("eager")
    return model.double().eval()


def scored(model, spec, pairs):
    layout = layout_of(model)
    with Wide():
        found = RewardModule(model, spec).eval()(collate(pairs, layout=layout))
        found.loss_P.sum().backward()
    return torch.cat([found.chosen_P, found.rejected_P]).detach(), model.get_input_embeddings().weight.grad


def plainly(folder, kind, spec, pairs, head=None):
    """Rewards and the gradient of the embeddings, one row at a time, by transformers alone."""
    loader = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = 1
    model = wide(loader.from_pretrained(folder, config=config, attn_implementation=eager(config)))
    if head is not None:
        model.score.weight.data.copy_(head)
    with Wide():
        chosen, rejected, loss = naive.rewards(model, spec, pairs)
        loss.sum().backward()
    return torch.cat([chosen, rejected]).detach(), model.get_input_embeddings().weight.grad


def eager(config):
    """The attention that has all that an architecture asks for."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def close(found, expected):
    size = float(expected.abs().max())
    assert size > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * max(1.0, size))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_rewards_gradients_and_what_is_saved_are_those_of_plain_transformers(kind, layout, tmp_path):
    pairs, folder = random_rows(), saved(kind, tmp_path / "base")
    for output, spec in (("unembedding", SPECS["im_rm_no_reference"]), ("head", SPECS["ex_rm"])):
        if output == "head" and kind in NO_HEAD:
            continue
        model = loaded(folder, output)
        alone = ", one at a time" if getattr(model, "rows_alone", False) else ""
        assert layout_of(model) + alone == layout
        rewards, gradient = scored(model, spec, pairs)
        head = model.score.weight.data.clone() if output == "head" else None
        expected, expected_gradient = plainly(folder, kind, spec, pairs, head)
        close(rewards, expected)
        close(gradient, expected_gradient)

        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    step = 0.01 * parameter.grad / (1e-9 + parameter.grad.abs().max())
                    # To what fp32 can keep, in which transformers loads it.
                    parameter.copy_((parameter - step).float())
        trained, _ = scored(model, spec, pairs)
        assert not torch.allclose(trained, rewards, rtol=1e-6)
        weights = {name: value.detach() for name, value in model.named_parameters()} | persistent_buffers(
            model
        )
        save_model(weights, folder_files(model, small_tokenizer()), tmp_path / output)
        again, _ = plainly(
            tmp_path / output, kind, spec, pairs, None if head is None else model.score.weight.data
        )
        close(again, trained)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["gemma3", pytest.param("llama4", marks=pytest.mark.slow)])
def test_of_a_model_of_text_and_images_the_language_model_is_loaded(kind, tmp_path):
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    tiny_copy(model).float().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([list(ORDINARY_TOKENS[:12])])
    with torch.inference_mode():
        expected = AutoModelForImageTextToText.from_pretrained(tmp_path)(input_ids=ids).logits
        found = load_model(str(tmp_path), tokenizer=small_tokenizer(), output="unembedding", precision="fp32")
        assert not [name for name, _ in found.named_parameters() if "vision" in name]
        found.set_attn_implementation("sdpa")
        torch.testing.assert_close(found(input_ids=ids).logits, expected)


# A layer that is no plain one, a tied and scaled unembedding, no class with a head, weights that layers share.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "output"),
    [
        pytest.param("cohere", "unembedding"),
        pytest.param("granite", "head"),
        *(
            pytest.param(kind, output, marks=pytest.mark.slow)
            for kind in ("doge", "falcon", "gpt2", "llama4_text", "recurrent_gemma", "zamba2")
            for output in ("unembedding", "head")
        ),
    ],
)
def test_an_adapter_is_loaded_again_and_merged_on_every_layout(kind, output, tmp_path):
    spec = SPECS["ex_rm" if output == "head" else "im_rm_logits"]
    pairs, folder = random_rows(), saved(kind, tmp_path / "base")
    options = {"tokenizer": small_tokenizer(), "output": output, "precision": "fp32"}
    head_seed = 0 if output == "head" else None
    model = wide(load_model(str(folder), **options, head_seed=head_seed, lora=LoraSpec(rank=2)))
    plain, _ = scored(model, spec, pairs)
    trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
    assert all(item.grad.any() for name, item in trained.items() if ".lora_A." not in name)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for item in trained.values():
            item.copy_((item + 0.05 * torch.randn(item.shape, generator=noise)).float())
    rewards, _ = scored(model, spec, pairs)
    assert not torch.allclose(rewards, plain, rtol=1e-3)
    files = folder_files(model, small_tokenizer(), adapter=True)
    weights = {saved_name(name): item.detach() for name, item in trained.items()}
    save_model(weights, files, tmp_path / "adapter")
    close(scored(wide(load_model(str(tmp_path / "adapter"), **options)), spec, pairs)[0], rewards)
    everything = {name: item.detach() for name, item in model.named_parameters()} | persistent_buffers(model)
    save_model(merged(model, everything), folder_files(model, small_tokenizer()), tmp_path / "merged")
    whole, _ = scored(wide(load_model(str(tmp_path / "merged"), **options)), spec, pairs)
    torch.testing.assert_close(whole, rewards, rtol=1e-5, atol=1e-5)


class GraniteReward(GenericForSequenceClassification, GranitePreTrainedModel):
    """The class of docs/models.md."""


def test_a_head_without_a_class_is_loaded_as_the_page_says(tmp_path):
    pairs, folder = random_rows(), saved("granite", tmp_path / "base")
    model = loaded(folder, "head")
    rewards, _ = scored(model, SPECS["ex_rm"], pairs)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_model(weights, folder_files(model, small_tokenizer()), tmp_path / "saved")
    plain = GraniteReward.from_pretrained(tmp_path / "saved").double().eval()
    with torch.inference_mode(), Wide():
        for pair, reward in zip(pairs, rewards[: len(pairs)], strict=True):
            logit = plain(input_ids=torch.tensor([pair.prompt + pair.chosen])).logits
            assert float(logit) == pytest.approx(float(reward), rel=1e-9)
