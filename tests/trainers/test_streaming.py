"""Scoring with layers that are on the device only while they compute."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.trainers.architectures import load_architecture, random_pairs, save_architecture
from trainers.evaluate.scoring import compute_reference, score_pairs
from trainers.models import streaming
from trainers.models.architecture import widest
from trainers.models.reward_parts import RewardModule
from trainers.models.streaming import stream_layers, to_score
from trainers.rewards import RewardSpec

EX_RM, IM_RM = RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=0.1)
PAIRS = random_pairs(count=6)


def say_nothing(row):
    pass


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_neox"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    save_architecture(request.param, made)
    return made


def layers_of(model):
    """The layers, and where the weights of each are."""
    layers = streaming.layers_of(model)
    assert len(layers) > 1
    return layers, [[item.data_ptr() for item in layer.parameters()] for layer in layers]


@pytest.mark.parametrize("spec", [EX_RM, IM_RM], ids=lambda spec: spec.kind)
def test_scores_and_reference_are_those_of_the_whole_model_bit_for_bit(folder, spec):
    whole = copy.deepcopy(load_architecture(folder, spec.type.output))
    model = stream_layers(copy.deepcopy(whole), "cpu")
    layers, at_home = layers_of(model)
    weights = [item.clone() for item in model.parameters()]
    away = []

    def look(layer, *_):
        now = [[item.data_ptr() for item in other.parameters()] for other in layers]
        away.append(
            [number for number, (here, home) in enumerate(zip(now, at_home, strict=True)) if here != home]
        )

    for layer in layers:
        layer.register_forward_pre_hook(look)
    reference = None
    if spec.uses_reference:
        reference = compute_reference(whole, PAIRS, report=say_nothing)
        assert compute_reference(model, PAIRS, report=say_nothing) == reference
    rewards = [
        score_pairs(RewardModule(some, spec), PAIRS, reference=reference, report=say_nothing)
        for some in (whole, model)
    ]
    for mine, right in zip(*rewards, strict=True):
        assert (mine == right).all()
    # Only the layer that computes has weights elsewhere.
    assert away[: len(layers)] == [[number] for number in range(len(layers))]
    assert layers_of(model)[1] == at_home
    assert all(map(torch.equal, model.parameters(), weights))


def test_one_layer_beside_the_one_that_computes_is_copied_and_none_stays_after_the_last(folder, monkeypatch):
    held, most, fetch = [], [], streaming._Streamed.fetch

    def follow(self):
        fetch(self)
        held.append(self)
        most.append(sum(bool(one.copies) for one in held))

    monkeypatch.setattr(streaming._Streamed, "fetch", follow)
    model = stream_layers(copy.deepcopy(load_architecture(folder, "unembedding")), "cpu")
    compute_reference(model, PAIRS[:1], report=say_nothing)
    assert len(held) == len(layers_of(model)[0])
    assert max(most) <= 2
    assert not any(one.copies for one in held)


def test_a_layer_that_fails_gets_its_weights_back(folder):
    model = stream_layers(copy.deepcopy(load_architecture(folder, "unembedding")), "cpu")
    layers, at_home = layers_of(model)

    def fail(*_):
        raise ValueError("too large")

    hook = layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="too large"):
        compute_reference(model, PAIRS, report=say_nothing)
    hook.remove()
    assert layers_of(model)[1] == at_home
    compute_reference(model, PAIRS, report=say_nothing)


def test_the_widest_layer_counts_where_a_config_has_a_width_for_each():
    assert widest(SimpleNamespace(intermediate_size=[8, 32, 16], hidden_size=4)) == 32
    assert widest(SimpleNamespace(hidden_size=4)) == 16


def test_the_memory_of_the_device_decides(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(streaming, "stream_layers", lambda model, device: asked.append(device) or model)
    model = load_architecture(folder, "unembedding")
    for gb in (80.0, 2.0):
        monkeypatch.setattr(streaming, "device_gb", lambda device, gb=gb: gb)
        to_score(model, "cpu")
    assert asked == ["cpu"]
