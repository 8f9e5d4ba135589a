"""Generated answers are those of a plain loop without cache, batch or padding; draws are each prompt's own."""

import numpy as np
import pytest
import torch

from tests.conftest import save_tiny_llama
from trainers.generation import choose, generate, load_generator
from trainers.specs import UNTRUSTED
from trainers.tiny import build_tokenizer

PROMPTS = [[2, 5, 9, 7], [2, 11], [2, 8, 8, 20, 6, 30, 12], [2, 13, 4]]
END, LENGTH = 3, 6


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_generator(str(tiny_model), revision=None, precision="fp32", trust=UNTRUSTED).double()


def plain(model, prompt, temperature, seed, number, sample):
    """By the definition: the whole sequence through the model for every token."""
    draws = np.random.default_rng([seed, number, sample]).random(LENGTH)
    ids = list(prompt)
    for draw in draws:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int((logits.div(temperature).softmax(-1).cumsum(-1) <= draw).sum())
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_answers_are_those_of_a_loop_without_cache_or_padding(model, temperature, batch):
    found = generate(
        model,
        PROMPTS,
        end=END,
        samples=2,
        temperature=temperature,
        max_new_tokens=LENGTH,
        seed=5,
        batch=batch,
    )
    assert found == [
        [plain(model, prompt, temperature, 5, number, sample) for sample in range(2)]
        for number, prompt in enumerate(PROMPTS)
    ]


def test_ropes_that_depend_on_length_draw_the_same_in_any_batch(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    # Shorter than the longest prompt, as long as the others with a part of their answers.
    options = {"max_position_embeddings": 6, "rope_parameters": rope}
    save_tiny_llama(tmp_path, build_tokenizer(), seed=0, tied=True, **options)
    model = load_generator(str(tmp_path), revision=None, precision="fp32", trust=UNTRUSTED).double()
    asked = {"end": END, "samples": 4, "temperature": 1.0, "max_new_tokens": 12, "seed": 5}
    found = generate(model, PROMPTS, **asked)
    assert generate(model, PROMPTS, batch=1, **asked) == found
    # The model has seen longer rows since.
    assert generate(model, PROMPTS, **asked) == found


def test_another_seed_draws_other_answers(model):
    def drawn(seed):
        return generate(model, PROMPTS, end=END, samples=1, temperature=1.0, max_new_tokens=LENGTH, seed=seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_an_answer_stops_before_its_end(model):
    def drawn(end):
        asked = {"samples": 1, "temperature": 1.0, "max_new_tokens": LENGTH, "seed": 5}
        return generate(model, PROMPTS, end=end, **asked)

    whole = drawn(-1)
    end = whole[0][0][2]
    cut = [[tokens[: tokens.index(end)] if end in tokens else tokens for tokens in some] for some in whole]
    assert len(whole[0][0]) == LENGTH
    assert drawn(end) == cut


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3]]))
    draws = (torch.arange(1000) + 0.5) / 1000
    counts = choose(logits.expand(1000, 3), draws, 1.0).bincount(minlength=3)
    assert counts.tolist() == [100, 600, 300]
    sharper = choose(logits.expand(1000, 3), draws, 0.5).bincount(minlength=3)
    assert sharper.tolist() == pytest.approx([1000 * p / 0.46 for p in (0.01, 0.36, 0.09)], abs=1)
