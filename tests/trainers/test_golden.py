"""Golden outputs of the stages whose keys carry a version: change the mathematics and the version must go up.

After raising a version in trainers/versions.py, write the new numbers here under it.
"""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainers import trainings
from tests.trainers.architectures import VOCABULARY, small_tokenizer
from tests.trainers.digests import content_digest
from trainers import versions
from trainers.data.records import Message, Pair
from trainers.evaluate.scoring import compute_reference, score_pairs
from trainers.models.reward_parts import RewardModule
from trainers.models.tiny import build_tokenizer
from trainers.pairs.tokens import TokenPair, tokenize_pairs
from trainers.rewards import RewardSpec
from trainers.specs import DrawSpec, OptimSpec
from trainers.train.loop import train

BETA = 0.1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs():
    source = random.Random(2)

    def draw(count):
        return [source.randrange(VOCABULARY) for _ in range(count)]

    return [TokenPair(index=i, prompt=draw(5 + i), chosen=draw(3), rejected=draw(4)) for i in range(6)]


def load(folder, kind):
    return trainings.load(folder, "head" if kind == "ex_rm" else "unembedding")


def rounded(values):
    return [round(float(value), 4) for value in values]


def test_prepare():
    golden = {2: ([2, 0], [5, 5], 1)}
    rows = [("yes", "no"), ("sure", "never no no no no no"), ("certainly", "nope")]
    pairs = [Pair(prompt=(Message("user", "bread"),), chosen=a, rejected=b) for a, b in rows]
    tokens, counts = tokenize_pairs(pairs, build_tokenizer(), DrawSpec(max_pairs=3, max_response_tokens=4))
    found = [pair.index for pair in tokens], [len(pair.prompt) for pair in tokens], counts.too_long
    assert found == golden[versions.PREPARE]


def test_content_digest():
    pair = Pair(prompt=(Message("user", "why?"),), chosen="because", rejected="no")
    assert content_digest([pair])[:16] == "49454456bf35edc5"


def test_reference(model, pairs):
    golden = {
        1: [
            *(-13.5203, -16.9447, -14.6996, -18.1299, -13.4136, -20.3514),
            *(-15.1664, -19.4212, -14.3770, -19.8854, -12.0904, -18.7128),
        ]
    }
    sums = compute_reference(load(model, "im_rm"), pairs, report=lambda row: None)
    found = rounded(value for index in sorted(sums) for value in sums[index])
    assert found == pytest.approx(golden[versions.REFERENCE], abs=2e-4)


@pytest.mark.parametrize("kind", ["ex_rm", "im_rm"])
def test_train_and_evaluate(model, pairs, tmp_path, kind):
    golden_losses = {
        (2, "ex_rm"): [0.6988, 0.6733, 0.6739, 0.6399],
        (2, "im_rm"): [0.6931, 0.6904, 0.6313, 0.6088],
    }
    golden_rewards = {
        (2, "ex_rm"): [0.0968, 0.0558, 0.0849, -0.0481, 0.0599, 0.1626],
        (2, "im_rm"): [0.0374, 0.1380, 0.1063, 0.0799, 0.1312, 0.1312],
    }
    reward = RewardSpec(kind=kind, beta=None if kind == "ex_rm" else BETA)
    reference = None
    if kind == "im_rm":
        reference = compute_reference(load(model, kind), pairs, report=lambda row: None)
    optim = OptimSpec(lr=1e-3, epochs=2, effective_batch=4)
    inputs = trainings.inputs(model, pairs, reward=reward, optim=optim, reference=reference)
    result = train(inputs, report=lambda row: None, out_dir=tmp_path)
    assert [row["loss"] for row in result.log] == pytest.approx(golden_losses[versions.TRAIN, kind], abs=2e-4)
    trained = RewardModule(load(tmp_path / "model", kind), reward)
    chosen, _ = score_pairs(trained, pairs, reference=reference, report=lambda row: None)
    assert rounded(chosen) == pytest.approx(golden_rewards[versions.EVALUATE, kind], abs=2e-4)
