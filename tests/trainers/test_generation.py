"""Answers are those of a plain loop without cache, batch or padding, and drawn as often as they are likely."""

import json
import shutil
from collections import Counter

import pytest
import torch

from tests.conftest import save_tiny_llama
from tests.trainers.test_kinds import saved
from trainers.models.generation import Weights, generate
from trainers.models.tiny import build_tokenizer
from trainers.models.tiny_copy import ORDINARY_TOKENS, Wide
from trainers.specs import UNTRUSTED

PROMPTS = [[2, 5, 9, 7], [2, 11], [2, 8, 8, 20, 6, 30, 12], [2, 13, 4]]
END, LENGTH = 3, 6
ASKED = {"end": END, "samples": 2, "temperature": 1.0, "max_new_tokens": LENGTH, "seed": 5}


# Padding, or a cache, changes what they give.
ALONE = ("llama4_text", "deepseek_v32")


def loaded(folder):
    weights = Weights(location=str(folder), revision=None, precision="fp32", trust=UNTRUSTED)
    return weights.generator().double()


@pytest.fixture(scope="module")
def model(tiny_model):
    return loaded(tiny_model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_folders_settings_of_generation_change_no_answer(model, tiny_model, tmp_path, temperature):
    asked = {**ASKED, "temperature": temperature, "samples": 2 if temperature else 1}
    expected = generate(model, PROMPTS, **asked)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    said = {"repetition_penalty": 3.0, "suppress_tokens": expected[0][0][:2], "top_k": 1, "eos_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert generate(loaded(folder), PROMPTS, **asked) == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["rwkv", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALONE)])
def test_a_model_that_reads_padding_gets_none(kind, tmp_path):
    model, first = loaded(saved(kind, tmp_path / "model")), ORDINARY_TOKENS[0]
    prompts = [[first + token for token in prompt] for prompt in PROMPTS]
    with Wide():
        found = generate(model, prompts, **{**ASKED, "end": -1, "samples": 1, "temperature": 0.0})
        assert found == [[likeliest(model, prompt)] for prompt in prompts]


def likeliest(model, prompt, length=LENGTH):
    """By the definition: the whole sequence through the model for every token."""
    ids = list(prompt)
    for _ in range(length):
        with torch.inference_mode():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_likeliest_answers_are_those_of_a_loop_without_cache_or_padding(model, batch):
    found = generate(model, PROMPTS, **{**ASKED, "samples": 1, "temperature": 0.0}, batch=batch)
    assert found == [[likeliest(model, prompt)] for prompt in PROMPTS]


def test_ropes_that_depend_on_length_answer_the_same_in_any_batch(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    # Shorter than the longest prompt, as long as the others with a part of their answers.
    options = {"max_position_embeddings": 6, "rope_parameters": rope}
    save_tiny_llama(tmp_path, build_tokenizer(), seed=0, tied=True, **options)
    model = loaded(tmp_path)
    asked = {**ASKED, "samples": 1, "temperature": 0.0, "max_new_tokens": 12}
    found = generate(model, PROMPTS, **asked)
    assert generate(model, PROMPTS, batch=1, **asked) == found
    # The model has seen longer rows since.
    assert generate(model, PROMPTS, **asked) == found


def test_a_seed_draws_the_same_answers_again_and_leaves_the_callers_random_state(model):
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, **ASKED)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(some) for some in first] == [2] * len(PROMPTS)
    assert generate(model, PROMPTS, **ASKED) == first
    assert generate(model, PROMPTS, **{**ASKED, "seed": 6}) != first


def test_an_answer_stops_before_the_first_of_its_ends(model):
    whole = generate(model, PROMPTS[:1], **{**ASKED, "end": -1, "samples": 1, "temperature": 0.0})
    ((tokens,),) = whole
    assert len(tokens) == LENGTH
    for end in ({tokens[2], tokens[4]}, tokens[3]):
        ends = end if isinstance(end, set) else {end}
        first = next(place for place, token in enumerate(tokens) if token in ends)
        found = generate(model, PROMPTS[:1], **{**ASKED, "end": end, "samples": 1, "temperature": 0.0})
        assert found == [[tokens[:first]]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_as_often_as_they_are_likely(model, temperature):
    count = 4000
    asked = {**ASKED, "end": -1, "samples": count, "temperature": temperature, "max_new_tokens": 1}
    (answers,) = generate(model, PROMPTS[:1], **asked)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1]
    likely = (logits / temperature).softmax(-1)
    drawn = Counter(token for (token,) in answers)
    for token, share in enumerate(likely.tolist()):
        assert drawn[token] / count == pytest.approx(
            share, abs=4 * (share * (1 - share) / count) ** 0.5 + 1e-3
        )
