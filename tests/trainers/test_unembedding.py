"""Log-probabilities in blocks of the vocabulary against a log-softmax over all of it."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers.models import unembedding
from trainers.models.unembedding import Unembedding

TOKENS, WIDTH, VOCABULARY = 7, 6, 50


def layer(*, bias=False, dtype=torch.float64, vocabulary=VOCABULARY, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    made = Unembedding(width, vocabulary, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn.to(dtype))
    return made


def inputs(*, dtype=torch.float64, tokens=TOKENS, vocabulary=VOCABULARY, width=WIDTH):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    # A token twice, and the ends of the vocabulary.
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[:3] = torch.tensor([0, vocabulary - 1, vocabulary - 1])
    return hidden.requires_grad_(), target


def full(hidden, weight, bias, target, softcap):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


@pytest.fixture(params=[1, 16, 64], ids=lambda size: f"blocks-of-{size}")
def block(request, monkeypatch):
    monkeypatch.setattr(unembedding, "_SMALLEST_BLOCK", request.param)
    monkeypatch.setattr(unembedding, "_BLOCK_ELEMENTS_ON_CPU", 1)


def assert_equal(left, right, tolerance):
    assert float((left - right).detach().abs().max()) <= tolerance


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_a_full_log_softmax(block, bias, softcap):
    ours, theirs = layer(bias=bias), layer(bias=bias)
    (hidden, target), (other_hidden, _) = inputs(), inputs()
    ours.softcap = softcap
    found = ours(hidden, target)
    expected = full(other_hidden, theirs.weight, theirs.bias, target, softcap)
    assert_equal(found, expected, 1e-12)
    slope = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    (found * slope).sum().backward()
    (expected * slope).sum().backward()
    assert_equal(hidden.grad, other_hidden.grad, 1e-12)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_equal(left.grad, right.grad, 1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unchanged(frozen):
    found = []
    for stops in (True, False):
        made, (hidden, target) = layer(bias=True), inputs()
        values = {"hidden": hidden, "weight": made.weight, "bias": made.bias}
        values[frozen].requires_grad_(not stops)
        made(hidden, target).sum().backward()
        found.append({name: value.grad for name, value in values.items()})
    assert found[0].pop(frozen) is None
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_logits_far_beyond_exp_stay_finite(block):
    made, (hidden, target) = layer(), inputs()
    found = made(hidden * 1e4, target)
    assert_equal(found, full(hidden * 1e4, made.weight, None, target, None), 1e-8)
    found.sum().backward()
    assert bool(torch.isfinite(hidden.grad).all())


def test_bf16_is_computed_as_if_widened(block):
    made, (hidden, target) = layer(dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    wide = layer(dtype=torch.bfloat16).float()
    wide_hidden = hidden.detach().float().requires_grad_()
    found, expected = made(hidden, target), wide(wide_hidden, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(hidden.grad, wide_hidden.grad.bfloat16())
    assert torch.equal(made.weight.grad, wide.weight.grad.bfloat16())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tensor_cores_give_the_widened_values_and_gradients_to_bf16(block, monkeypatch, softcap):
    multiplied = []

    def mm(left, right, *, out_dtype):
        multiplied.append((left.dtype, right.dtype))
        return left.to(out_dtype) @ right.to(out_dtype)

    wide = layer(dtype=torch.bfloat16, bias=True)
    wide_hidden, target = inputs(dtype=torch.bfloat16)
    wide.softcap = softcap
    expected = wide(wide_hidden, target)
    slope = torch.linspace(-1, 2, TOKENS)
    (expected * slope).sum().backward()
    monkeypatch.setattr(unembedding, "_on_tensor_cores", lambda values: values.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", mm)
    made, (hidden, _) = layer(dtype=torch.bfloat16, bias=True), inputs(dtype=torch.bfloat16)
    made.softcap = softcap
    found = made(hidden, target)
    assert torch.equal(found, expected)
    (found * slope).sum().backward()
    assert set(multiplied) == {(torch.bfloat16, torch.bfloat16)}
    assert torch.equal(made.bias.grad, wide.bias.grad)
    for left, right in ((hidden.grad, wide_hidden.grad), (made.weight.grad, wide.weight.grad)):
        assert left.dtype == torch.bfloat16
        assert (left.float() - right.float()).norm() <= 2**-7 * right.float().norm()


class Operations(TorchDispatchMode):
    """What is called, and of which types."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        dtypes = [leaf.dtype for leaf in arguments if isinstance(leaf, torch.Tensor)]
        self.called.append((function.name(), dtypes))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_on_tensor_cores_bf16_is_multiplied_as_it_is_and_nothing_waits(monkeypatch, softcap):
    monkeypatch.setattr(unembedding, "_on_tensor_cores", lambda values: values.dtype == torch.bfloat16)
    # Without values: what would look at one, as `nonzero` does and a GPU would have to wait for, is refused.
    with FakeTensorMode():
        made = Unembedding(WIDTH, 100_000, dtype=torch.bfloat16)
        hidden = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        with Operations() as recorded:
            made.softcap = softcap
            found = made(hidden, torch.empty(TOKENS, dtype=torch.long))
            found.sum().backward()
    assert found.dtype == torch.float32
    assert hidden.grad.dtype == made.weight.grad.dtype == torch.bfloat16
    products = [(name, types) for name, types in recorded.called if "mm" in name]
    assert products
    assert all(found == ("aten::mm.dtype", [torch.bfloat16] * 2) for found in products)


@pytest.mark.parametrize(
    ("cuda", "dtype", "hip", "chosen"),
    [
        (True, torch.bfloat16, None, True),
        (True, torch.bfloat16, "7.0", False),
        (True, torch.float16, None, False),
        (True, torch.float32, None, False),
        (False, torch.bfloat16, None, False),
    ],
)
def test_tensor_cores_are_chosen_for_bf16_on_nvidias_gpus(monkeypatch, cuda, dtype, hip, chosen):
    monkeypatch.setattr(torch.version, "hip", hip)
    assert unembedding._on_tensor_cores(SimpleNamespace(is_cuda=cuda, dtype=dtype)) == chosen


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives, those of the weight's shape and views of it aside."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.shape != self.weight.shape:
                self.elements = max(self.elements, leaf.numel())
        return result


def largest_tensor(vocabulary):
    made = layer(dtype=torch.float32, vocabulary=vocabulary, width=8)
    hidden, target = inputs(dtype=torch.float32, tokens=64, vocabulary=vocabulary, width=8)
    with LargestTensor(made.weight) as recorded:
        made.softcap = 2.0
        made(hidden, target).sum().backward()
    return recorded.elements


def test_no_tensor_grows_with_the_vocabulary_but_the_gradient_of_the_weight(monkeypatch):
    block = 64 * 128
    monkeypatch.setattr(unembedding, "_SMALLEST_BLOCK", 16)
    monkeypatch.setattr(unembedding, "_BLOCK_ELEMENTS_ON_CPU", block)
    assert [largest_tensor(vocabulary) for vocabulary in (512, 2048, 8192)] == [block] * 3
