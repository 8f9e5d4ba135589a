"""Attention over packed pairs, kernel by kernel, against a softmax under a dense mask."""

import functools
import math
from itertools import pairwise

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from orchestrator.spec.catalog import ARCHITECTURES
from trainers.models import attention
from trainers.pairs.packing import PairLayout, Span

# Of the last two one response stands alone.
LENGTHS = ((5, 3, 4), (7, 1, 6), (1, 6, 1), (9, 2, 2), (4, 2, 0), (4, 0, 3))
KERNELS = {
    "pairwise": attention._pairwise_attention,
    "flex": functools.partial(attention._flex_attention, kernel=flex_attention),
}
HEADS, KEY_HEADS, WIDTH = 4, 2, 16
SCALE = 0.3


# One block of tokens, then several, of which some are seen as a whole.
SHORT, LONG = ((5, 3, 4), (40, 30, 20)), ((150, 60, 50), (1, 1, 1), (20, 0, 30))


def rule_of(window):
    """What transformers gives a layer with that window, or without one."""
    if window is None:
        return attention._rule_of_layer(mask_function=causal_mask_function)
    return attention._rule_of_layer(mask_function=sliding_window_causal_mask_function(window))


def layout(parts=LENGTHS):
    spans, start = [], 0
    for lengths in parts:
        spans.append(Span(start, *lengths))
        start = spans[-1].end
    return PairLayout(tuple(spans))


def states(dtype=torch.float32, key_heads=KEY_HEADS):
    generator = torch.Generator().manual_seed(0)
    size = layout().spans[-1].end
    shapes = [(1, heads, size, WIDTH) for heads in (HEADS, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_hand(window):
    """[N, N]: may a token see another, pair by pair and part by part."""
    size = layout().spans[-1].end
    seen = torch.zeros(size, size, dtype=torch.bool)
    for span in layout().spans:
        prompt = list(range(span.start, span.start + span.prompt))
        chosen = list(range(span.start + span.prompt, span.rejected_start))
        rejected = list(range(span.rejected_start, span.end))
        for row in (prompt + chosen, prompt + rejected):
            for at, query in enumerate(row):
                for of in range(at + 1):
                    seen[query, row[of]] = window is None or at - of < window
    return seen


def same_chunk(size):
    places = []
    for span in layout().spans:
        places += [*range(span.prompt + span.chosen), *range(span.prompt, span.prompt + span.rejected)]
    chunk = torch.tensor(places) // size
    return chunk[:, None] == chunk


def dense_attention(query, key, value, seen, softcap, sinks=None):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = SCALE * query @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is None:
        return scores.softmax(-1) @ value
    sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ value


CHUNKS = attention._rule_of_layer(mask_function=chunked_causal_mask_function(4, torch.zeros(1).long()))
# A layer's rule, and what its tokens may see: all, a window, a window of any row's length, chunks.
SEEN = {
    **{str(window): (rule_of(window), by_hand(window)) for window in (None, 1, 4, 100)},
    "chunks": (CHUNKS, by_hand(None) & same_chunk(4)),
}


@pytest.mark.parametrize(
    "sinks", [None, torch.tensor([-1.0, 0.0, 0.5, 3.0]).double()], ids=["plain", "sinks"]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_a_softmax_over_what_is_visible(kernel, key_heads, softcap, sinks):
    shared = layout()
    # Layers of different rules share a layout, which keeps the masks of each.
    for rule, seen in [*SEEN.values()] * 2:
        made = dict(shared.masks)
        ours, theirs = (states(torch.float64, key_heads) for _ in range(2))
        for state in (*ours, *theirs):
            state.requires_grad_(kernel == "pairwise")
        found = KERNELS[kernel](*ours, shared, SCALE, rule, softcap, sinks)
        # A sink is a key that all see, and whose value is nothing.
        expected = dense_attention(*theirs, seen, softcap, sinks).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if kernel == "pairwise" else 1e-5)
        if kernel == "pairwise":
            found.square().sum().backward()
            expected.square().sum().backward()
            for left, right in zip(ours, theirs, strict=True):
                torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=1e-11)
        assert all(shared.masks[name] is mask for name, mask in made.items())


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize("parts", [SHORT, LONG, (*LONG, (300, 150, 100)), ((64, 32, 32), (128, 64, 64))])
def test_a_block_mask_is_the_one_that_torch_makes_of_all_tokens_at_once(parts, window):
    cpu = torch.device("cpu")
    may_see = attention.visible(layout(parts), rule_of(window), cpu)
    found = attention.block_mask(layout(parts), may_see, cpu)
    size = layout(parts).spans[-1].end
    expected = create_block_mask(may_see, None, None, size, size, device="cpu")
    assert found.seq_lengths == expected.seq_lengths
    for left, right in zip(found.as_tuple()[2:-1], expected.as_tuple()[2:-1], strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def plain_flash(query, key, value, of_query, of_key, most_queries, most_keys, *flags, **options):
    """What torch's FlashAttention promises: row by row, the last query sees the last key, and a window looks back."""
    dropout, causal, debug = flags
    before, after = options["window_size_left"], options["window_size_right"]
    assert (dropout, debug, after, causal) == (0.0, False, 0, before < 0)
    assert of_query.dtype == of_key.dtype == torch.int32
    parts = []
    for (first, last), (begin, end) in zip(
        pairwise(of_query.tolist()), pairwise(of_key.tolist()), strict=True
    ):
        assert last - first <= most_queries
        assert end - begin <= most_keys
        at, of = (
            torch.arange(last - first)[:, None] + (end - begin) - (last - first),
            torch.arange(end - begin),
        )
        seen = of <= at
        if before >= 0:
            seen = seen & (at - of <= before)
        keys, values = (x[begin:end].repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[first:last], keys) * options["scale"]
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts), torch.zeros(1), torch.zeros(2), torch.zeros(0), None


def plain_flash_backward(slope, query, key, value, output, sums, *rest, **options):
    *lengths, dropout, causal, _, _ = rest
    assert torch.are_deterministic_algorithms_enabled()
    assert slope.is_contiguous()
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        again = plain_flash(*leaves, *lengths, dropout, causal, False, **options)[0]
    return torch.autograd.grad(again, leaves, slope)


@pytest.fixture
def flash_on_cpu(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", plain_flash)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", plain_flash_backward)
    monkeypatch.setattr(attention, "fits_flash", lambda query, value: True)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS, 1])
def test_rows_of_different_lengths_give_the_values_and_gradients_of_pairs(flash_on_cpu, key_heads, window):
    ours, theirs = ([x.requires_grad_() for x in states(torch.float64, key_heads)] for _ in range(2))
    found, _ = attention.pair_attention(
        None, *ours, rule_of(window), pair_layout=layout(), scaling=SCALE, sliding_window=window
    )
    expected = attention._pairwise_attention(*theirs, layout(), SCALE, rule_of(window))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    gradients = (
        torch.autograd.grad(output, given, slope) for output, given in ((found, ours), (expected, theirs))
    )
    for left, right in zip(*gradients, strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-11)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("given", ["chunks", "softcap", "s_aux"])
def test_what_flash_attention_does_not_compute_is_left_to_other_kernels(flash_on_cpu, given, monkeypatch):
    monkeypatch.setattr(attention, "_flash_attention", lambda *arguments: "flash")
    rule, named = (
        rule_of(3),
        {"softcap": {"softcap": 2.0}, "s_aux": {"s_aux": torch.zeros(HEADS)}}.get(given, {}),
    )
    assert attention.pair_attention(None, *states(), rule, pair_layout=layout())[0] == "flash"
    if given == "chunks":
        rule = CHUNKS
    found, _ = attention.pair_attention(None, *states(), rule, pair_layout=layout(), **named)
    expected = attention._pairwise_attention(
        *states(), layout(), WIDTH**-0.5, rule, named.get("softcap"), named.get("s_aux")
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [None, 4])
def test_flash_attention_takes_what_it_is_given(window):
    """By its declaration in torch, on tensors without values."""
    given = [x.to("meta").bfloat16().requires_grad_() for x in states()]
    rows = attention._rows(layout(), torch.device("meta"))
    shared = PairLayout(layout().spans, {"rows": rows})
    found = attention._flash_attention(*given, shared, SCALE, window or 0)
    assert found.shape == (1, layout().spans[-1].end, HEADS, WIDTH)
    found.sum().backward()
    assert [x.grad.shape for x in given] == [x.shape for x in given]


def catalog_attention():
    """(query heads, key heads, width of a head, whether it is capped and has windows) of the catalog's models."""
    return sorted({(m.heads, m.key_heads, m.head_width, m.softcapped) for m in ARCHITECTURES.values()})


def values_and_gradients(attend, parts, shape, window, softcap, *, gradients):
    query_heads, key_heads, width, _ = shape
    generator = torch.Generator().manual_seed(0)
    size = layout(parts).spans[-1].end
    given = [
        torch.randn(1, heads, size, width, generator=generator).requires_grad_(gradients)
        for heads in (query_heads, key_heads, key_heads)
    ]
    with torch.set_grad_enabled(gradients):
        found = attend(*given, layout(parts), width**-0.5, rule_of(window), softcap)
    if not gradients:
        return [found]
    slope = torch.randn(found.shape, generator=generator)
    return [found, *torch.autograd.grad(found, given, slope)]


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention refuses gradients on a CPU, whose own kernel has none; graphs of plain operations have."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    graphs = []

    def lowered(graph, inputs):
        """What a GPU's compiler would get: it cannot lower a mask or score that is changed in place."""
        for module in graph.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                schema = getattr(node.target, "_schema", None)
                assert schema is None or not schema.is_mutable, node.target
        return graph

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_autograd(fw_compiler=lowered)(graph, inputs)

    yield backend, graphs
    torch.compiler.reset()


# What is tried on every change: capped with windows, and the most heads; compiling each takes seconds.
QUICK = ((8, 4, 256, True), (32, 8, 64, False))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=str(shape), marks=() if shape in QUICK else pytest.mark.slow)
        for shape in catalog_attention()
    ],
)
def test_the_fused_kernel_of_each_model_of_the_catalog_is_few_graphs(flex_on_cpu, shape):
    backend, graphs = flex_on_cpu
    kernel = attention.compiled_flex(backend)
    flex = functools.partial(attention._flex_attention, kernel=kernel)
    longer = [(*LONG, (number, 20, 10)) for number in (1, 150)]
    softcap, windows = (50.0, (None, 40)) if shape[3] else (None, (None,))
    for window in windows:
        for parts in (SHORT, LONG, *longer):
            for gradients in (False, True):
                arguments = (parts, shape, window, softcap)
                found = values_and_gradients(flex, *arguments, gradients=gradients)
                expected = values_and_gradients(
                    attention._pairwise_attention, *arguments, gradients=gradients
                )
                for left, right in zip(found, expected, strict=True):
                    assert torch.allclose(left, right, atol=1e-5)
    assert len(graphs) == 4 * len(windows) <= attention._FLEX_GRAPHS


def test_past_the_limit_of_graphs_attention_fails_rather_than_run_unfused(flex_on_cpu):
    backend, graphs = flex_on_cpu
    flex = functools.partial(attention._flex_attention, kernel=attention.compiled_flex(backend, 1))
    shape = (2, 1, 16, False)
    values_and_gradients(flex, SHORT, shape, None, None, gradients=False)
    with pytest.raises(FailOnRecompileLimitHit):
        values_and_gradients(flex, LONG, shape, None, None, gradients=False)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("device", "width", "dtype", "fits"),
    [
        ("cuda", 64, torch.bfloat16, True),
        ("cuda", 16, torch.float32, True),
        # The laptop profile's models.
        ("cuda", 12, torch.float32, False),
        ("cuda", 64, torch.float64, False),
        ("cpu", 64, torch.float32, False),
    ],
)
def test_flex_is_chosen_where_it_has_a_kernel(monkeypatch, device, width, dtype, fits):
    assert attention.fits_flex(device, width, dtype) == fits
    here = ("cpu", WIDTH, torch.float32)
    monkeypatch.setattr(attention, "fits_flex", lambda *given: fits and given == here)
    monkeypatch.setattr(attention, "_flex_attention", lambda *given: "flex")
    monkeypatch.setattr(attention, "_pairwise_attention", lambda *given: "pairwise")
    found, _ = attention.pair_attention(None, *states(), rule_of(None), pair_layout=layout())
    assert found == ("flex" if fits else "pairwise")


@pytest.mark.parametrize(
    ("what", "mask", "named"),
    [
        ("does not know position_bias", rule_of(None), {"position_bias": torch.zeros(1)}),
        ("does not know is_causal", rule_of(None), {"is_causal": False}),
        ("does not know a mask", torch.zeros(1), {}),
        ("does not know a mask", None, {}),
        ("without pair_layout", rule_of(None), {"pair_layout": None}),
    ],
)
def test_what_attention_would_have_to_ignore_is_refused(what, mask, named):
    with pytest.raises(ValueError, match=what):
        attention.pair_attention(None, *states(), mask, **{"pair_layout": layout(), **named})


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_the_fused_kernel_is_lowered_by_the_compiler_of_gpus(softcap):
    """On the CPU, where it has no gradients and no windows."""
    flex = functools.partial(attention._flex_attention, kernel=attention.compiled_flex("inductor"))
    for parts in (SHORT, LONG):
        (found,), (expected,) = (
            values_and_gradients(attend, parts, (4, 2, 16, False), None, softcap, gradients=False)
            for attend in (flex, attention._pairwise_attention)
        )
        assert torch.allclose(found, expected, atol=1e-5)
    torch.compiler.reset()
