"""Packed pairs give the rewards, log-probabilities and gradients of two plain rows, on every architecture."""

import copy
import importlib
import logging

import pytest
import torch
from transformers.masking_utils import causal_mask_function

from tests.trainers import naive
from tests.trainers.architectures import (
    ARCHITECTURES,
    SPECS,
    load_architecture,
    load_untrained,
    random_pairs,
    save_architecture,
)
from tests.trainers.trainings import load
from trainers.data.sources import read_pairs
from trainers.models import attention, layouts
from trainers.models.layouts import layout_of
from trainers.models.reward_parts import RewardModule, log_prob_sums
from trainers.pairs.packing import collate
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import tokenize_pairs
from trainers.specs import DatasetSpec, DrawSpec
from trainers.train.engine import _checkpoint_activations

SOFTMAX = torch.nn.functional.softmax


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in ARCHITECTURES}
    for name, folder in made.items():
        save_architecture(name, folder)
    return made


@pytest.fixture
def wide(monkeypatch):
    """transformers computes norms and eager softmax in fp32 even in a float64 model; here it may not."""

    def softmax(input, dim=None, dtype=None, **others):
        return SOFTMAX(input, dim=dim, dtype=torch.promote_types(input.dtype, dtype or input.dtype), **others)

    def scaled(x, eps):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def forward(self, x):
        return self.weight * scaled(x, self.variance_epsilon)

    def gemma_forward(self, x):
        return (1.0 + self.weight) * scaled(x, self.eps)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)
    for kind, norm in (
        ("Llama", forward),
        ("Qwen2", forward),
        ("Mistral", forward),
        ("Gemma2", gemma_forward),
    ):
        module = importlib.import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
        monkeypatch.setattr(getattr(module, f"{kind}RMSNorm"), "forward", norm)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(found, expected, tolerance):
    ours, theirs = gradients(found), gradients(expected)
    assert {name for name in ours if ours[name] is None} == {name for name in theirs if theirs[name] is None}
    held = [gradient for gradient in theirs.values() if gradient is not None]
    # A gradient that is zero but for rounding (a bias that cancels in every margin) has no relative error.
    noise = 10 * torch.finfo(held[0].dtype).eps * float(torch.nn.utils.get_total_norm(held))
    for name, gradient in theirs.items():
        if gradient is not None:
            assert float((ours[name] - gradient).norm()) <= max(tolerance * float(gradient.norm()), noise), (
                name
            )


def models(folder, spec, dtype):
    """(ours, the plain one) of the same weights."""
    ours = copy.deepcopy(load_architecture(folder, spec.type.output)).to(dtype)
    return ours, naive.plain(ours)


def references(spec, pairs):
    """Sums of no model at all; each of its own."""
    if not spec.uses_reference:
        return None
    return {pair.index: (-3.0 - pair.index, -5.0 - pair.index / 7) for pair in pairs}


def assert_as_naive(
    module, plain, spec, pairs, reference, tolerance=1e-9, of_gradients=1e-9, least=0.0, **layout
):
    """Rewards, losses and gradients are those of the definition."""
    found = module(collate(pairs, reference=reference, **layout))
    expected = naive.rewards(plain, spec, pairs, reference)
    for ours, theirs in zip(found, expected, strict=True):
        difference, size = (ours - theirs).detach().abs().max(), theirs.detach().abs().max()
        assert float(difference) <= tolerance * max(least, float(size))
    found.loss_P.sum().backward()
    expected[2].sum().backward()
    assert_same_gradients(module.model, plain, of_gradients)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rewards_losses_and_gradients_in_float64(folders, wide, name, spec):
    ours, plain = models(folders[name], spec, torch.float64)
    pairs = random_pairs(spec.kind)
    reference = references(spec, pairs)
    assert layout_of(ours) == "packed"
    assert_as_naive(RewardModule(ours, spec), plain, spec, pairs, reference)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["ex_rm", "im_rm"])
def test_sums_rewards_and_gradients_in_float32(folders, name, kind):
    spec = SPECS[kind]
    ours, plain = models(folders[name], spec, torch.float32)
    pairs = random_pairs()
    if kind == "im_rm":
        assert_same_sums(ours, plain, pairs)
    reference = naive.reference(plain, pairs) if spec.uses_reference else None
    assert_as_naive(RewardModule(ours, spec), plain, spec, pairs, reference, 1e-5, 1e-4, least=1.0)


def assert_same_sums(ours, plain, pairs):
    with torch.no_grad():
        found, expected = log_prob_sums(ours, collate(pairs)), naive.log_prob_sums(plain, pairs)
    assert bool(((found - expected).abs() <= 1e-5 * expected.abs()).all())


def count_attention(model):
    """A list that grows by one with every forward of an attention layer."""
    computed = []
    for layer in model.modules():
        if type(layer).__name__.endswith("Attention"):
            layer.register_forward_pre_hook(lambda *call: computed.append(1))
    return computed


@pytest.mark.parametrize("zero_stage", [0, 3], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["ex_rm", "im_rm"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_two_forwards_before_either_backward_with_recomputed_activations(
    folders, wide, name, kind, zero_stage
):
    spec = SPECS[kind]
    ours, plain = models(folders[name], spec, torch.float64)
    pairs = random_pairs()
    reference = references(spec, pairs)
    module = RewardModule(ours, spec).eval()
    _checkpoint_activations(module, zero_stage=zero_stage)
    computed = count_attention(ours)
    scores = [module(collate(part, reference=reference)) for part in (pairs[:1], pairs[1:])]
    for found in scores:
        found.loss_P.sum().backward()
    naive.rewards(plain, spec, pairs, reference)[2].sum().backward()
    assert_same_gradients(ours, plain, 1e-9)
    # Twice in each of two layers, for each of two micro-batches.
    assert len(computed) == 8


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_padded_rows_are_as_exact(folders, wide, name, spec):
    ours, plain = models(folders[name], spec, torch.float64)
    ours.set_attn_implementation(plain.config._attn_implementation)
    pairs = random_pairs(spec.kind)
    reference = references(spec, pairs)
    assert_as_naive(RewardModule(ours, spec), plain, spec, pairs, reference, layout="rows", pad_id=3)


def deaf_attention(*states, pair_layout=None, **options):
    """As of a model whose attention does not hand the layout on: every token sees all before it."""
    query, key, value = states[1:4]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attended.transpose(1, 2), None


def windowless_attention(module, query, key, value, rule, pair_attention=attention.pair_attention, **options):
    """As of a model whose layers do not get their own mask."""
    everything = attention.MaskRule(causal_mask_function, causal=True)
    return pair_attention(module, query, key, value, everything, **options)


def refusing_attention(*states, **options):
    raise TypeError("no such keyword")


OTHER_STATES = "it gives other hidden states than each row alone"
WRONG_ATTENTION = {
    "deaf": (deaf_attention, OTHER_STATES),
    "windowless": (windowless_attention, OTHER_STATES),
    "refusing": (refusing_attention, "no such keyword"),
    "own": (None, "its attention is its own"),
}


@pytest.fixture
def load_unpackable(folders):
    from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel

    patch = pytest.MonkeyPatch()

    def load(output, wrong="own"):
        patch.setattr(layouts, "_verdicts", {})
        if wrong == "own":
            patch.setattr(MistralPreTrainedModel, "_supports_attention_backend", False)
        else:
            patch.setattr(attention, "pair_attention", WRONG_ATTENTION[wrong][0])
        return load_untrained(folders["mistral"], output)

    yield load
    patch.undo()
    # transformers keeps what was registered last.
    attention.register()


@pytest.mark.parametrize("wrong", WRONG_ATTENTION)
def test_a_model_that_fails_the_probe_gets_rows_and_says_so(load_unpackable, caplog, wrong):
    with caplog.at_level(logging.WARNING):
        model = load_unpackable("unembedding", wrong)
    assert layout_of(model) == "rows"
    (warning,) = [
        record.getMessage() for record in caplog.records if record.name == "trainers.models.layouts"
    ]
    assert "two padded rows" in warning
    assert WRONG_ATTENTION[wrong][1] in warning
    assert "Mistral" in warning


@pytest.mark.parametrize("kind", ["ex_rm", "im_rm"])
def test_a_real_model_on_real_pairs_in_float32(shared, smollm2_folder, kind):
    spec = SPECS[kind]
    source = str(shared / "data" / "ultrafeedback")
    every = read_pairs(DatasetSpec(name="ultrafeedback", source=source), "test")
    shortest = sorted(every, key=lambda pair: len(pair.prompt[0].content + pair.chosen + pair.rejected))[:3]
    pairs, _ = tokenize_pairs(shortest, load_tokenizer(str(smollm2_folder)), DrawSpec())
    model = load(smollm2_folder, spec.type.output, head_seed=0)
    plain = naive.plain(model)
    if kind == "im_rm":
        assert_same_sums(model, plain, pairs)
    else:
        with torch.no_grad():
            found = torch.cat(RewardModule(model, spec)(collate(pairs))[:2])
            expected = torch.cat(naive.rewards(plain, spec, pairs)[:2])
        assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    reference = naive.reference(plain, pairs[:1]) if spec.uses_reference else None
    assert_as_naive(RewardModule(model, spec), plain, spec, pairs[:1], reference, 1e-5, 1e-4, least=1.0)
