"""Packed pairs give the rewards, log-probabilities and gradients of two plain rows, on every architecture."""

import copy
import dataclasses
import importlib
import logging

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM
from transformers.masking_utils import causal_mask_function

from tests.trainers import naive
from tests.trainers.architectures import (
    ARCHITECTURES,
    SPECS,
    VOCABULARY,
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


def far(found, expected):
    return float((found - expected).detach().abs().max())


def largest(values):
    return float(values.detach().abs().max())


def assert_same_sums(found, expected, tolerance):
    assert bool(((found - expected).abs() <= tolerance * expected.abs()).all())


def assert_scores_as_naive(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert far(ours, theirs) <= tolerance * largest(theirs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_packed(folders, name):
    for output in ("head", "unembedding"):
        assert layout_of(load_architecture(folders[name], output)) == "packed"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rewards_losses_and_gradients_in_float64(folders, wide, name, spec):
    ours, plain = models(folders[name], spec, torch.float64)
    pairs = random_pairs(spec.kind)
    reference = references(spec, pairs)
    found = RewardModule(ours, spec)(collate(pairs, reference=reference))
    expected = naive.rewards(plain, spec, pairs, reference)
    assert_scores_as_naive(found, expected, 1e-9)
    found.loss_P.sum().backward()
    expected[2].sum().backward()
    assert_same_gradients(ours, plain, 1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_prob_sums_and_their_gradients_in_float32(folders, name):
    ours, plain = models(folders[name], SPECS["im_rm"], torch.float32)
    pairs = random_pairs()
    found, expected = log_prob_sums(ours, collate(pairs)), naive.log_prob_sums(plain, pairs)
    assert_same_sums(found, expected, 1e-5)
    found.sum().backward()
    expected.sum().backward()
    assert_same_gradients(ours, plain, 1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ex_rm_rewards_and_their_gradients_in_float32(folders, name):
    spec = SPECS["ex_rm"]
    ours, plain = models(folders[name], spec, torch.float32)
    pairs = random_pairs()
    found, expected = RewardModule(ours, spec)(collate(pairs)), naive.rewards(plain, spec, pairs)
    bound = 1e-5 * max(1.0, largest(expected[0]), largest(expected[1]))
    assert max(far(found[0], expected[0]), far(found[1], expected[1])) <= bound
    found.loss_P.sum().backward()
    expected[2].sum().backward()
    assert_same_gradients(ours, plain, 1e-4)


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
    found = RewardModule(ours, spec)(collate(pairs, layout="rows", pad_id=3, reference=reference))
    expected = naive.rewards(plain, spec, pairs, reference)
    assert_scores_as_naive(found, expected, 1e-9)
    found.loss_P.sum().backward()
    expected[2].sum().backward()
    assert_same_gradients(ours, plain, 1e-9)


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


@pytest.mark.parametrize("kind", ["ex_rm", "im_rm", "ex_grm"])
def test_rewards_of_a_model_that_gets_rows_are_those_of_packed_pairs(folders, load_unpackable, kind):
    spec = SPECS[kind]
    packed = load_architecture(folders["mistral"], spec.type.output)
    rows = load_unpackable(spec.type.output)
    rows.load_state_dict(packed.state_dict())
    pairs = random_pairs(kind)
    with torch.no_grad():
        found, expected = (
            RewardModule(model, spec)(
                collate(pairs, layout=layout_of(model), reference=references(spec, pairs))
            )
            for model in (rows, packed)
        )
    assert_scores_as_naive(found, expected, 1e-5)


def save_cohere(folder, logit_scale):
    config = CohereConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        logit_scale=logit_scale,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CohereForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("scale", [0.0625, 1.0])
def test_a_causal_model_with_scaled_logits_is_packed_and_its_scale_is_known(tmp_path, scale):
    save_cohere(tmp_path, logit_scale=scale)
    model = load_untrained(tmp_path, "unembedding")
    assert layout_of(model) == "packed"
    assert model.get_output_embeddings().scale == pytest.approx(scale)


@pytest.fixture(scope="session")
def real_pairs(shared, smollm2_folder):
    spec = DatasetSpec(name="ultrafeedback", source=str(shared / "data" / "ultrafeedback"))
    every = read_pairs(spec, "test")
    shortest = sorted(every, key=lambda pair: len(pair.prompt[0].content + pair.chosen + pair.rejected))[:3]
    pairs, _ = tokenize_pairs(shortest, load_tokenizer(str(smollm2_folder)), DrawSpec())
    return [dataclasses.replace(pair, index=number) for number, pair in enumerate(pairs)]


@pytest.mark.parametrize("kind", ["ex_rm", "im_rm"])
def test_a_real_model_on_real_pairs(smollm2_folder, real_pairs, kind):
    spec = SPECS[kind]
    model = load(smollm2_folder, spec.type.output, head_seed=0)
    plain = naive.plain(model)
    with torch.no_grad():
        if kind == "im_rm":
            found, expected = (
                log_prob_sums(model, collate(real_pairs)),
                naive.log_prob_sums(plain, real_pairs),
            )
            assert_same_sums(found, expected, 1e-5)
            return
        found = torch.cat(RewardModule(model, spec)(collate(real_pairs))[:2])
        expected = torch.cat(naive.rewards(plain, spec, real_pairs)[:2])
        assert far(found, expected) <= 1e-5 * max(1.0, largest(expected))


@pytest.mark.parametrize("kind", ["ex_rm", "im_rm"])
def test_gradients_of_a_real_model_on_a_real_pair(smollm2_folder, real_pairs, kind):
    spec = dataclasses.replace(SPECS[kind], reference=True)
    model = load(smollm2_folder, spec.type.output, head_seed=0)
    plain, pairs = naive.plain(model), real_pairs[:1]
    reference = naive.reference(plain, pairs) if spec.uses_reference else None
    RewardModule(model, spec)(collate(pairs, reference=reference)).loss_P.sum().backward()
    naive.rewards(plain, spec, pairs, reference)[2].sum().backward()
    assert_same_gradients(model, plain, 1e-4)
