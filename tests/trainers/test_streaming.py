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


@pytest.mark.parametrize("spec", [EX_RM, IM_RM], ids=lambda spec: spec.kind)
def test_scores_and_reference_are_those_of_the_whole_model_bit_for_bit(folder, spec):
    whole = copy.deepcopy(load_architecture(folder, spec.type.output))
    model = stream_layers(copy.deepcopy(whole), "cpu")
    layers = streaming.layers_of(model)

    def places():
        return [[item.data_ptr() for item in layer.parameters()] for layer in layers]

    at_home, away = places(), []

    def look(layer, *_):
        away.append([here != home for here, home in zip(places(), at_home, strict=True)])

    for layer in layers:
        layer.register_forward_pre_hook(look)
    reference = compute_reference(whole, PAIRS, report=say_nothing) if spec.uses_reference else None
    assert reference is None or compute_reference(model, PAIRS, report=say_nothing) == reference
    mine, right = (
        score_pairs(RewardModule(some, spec), PAIRS, reference=reference, report=say_nothing)
        for some in (model, whole)
    )
    assert all((ours == theirs).all() for ours, theirs in zip(mine, right, strict=True))
    # Only the layer that computes has weights elsewhere.
    assert away[: len(layers)] == [[other is layer for other in layers] for layer in layers]

    def fail(*_):
        raise ValueError("too large")

    layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="too large"):
        score_pairs(RewardModule(model, spec), PAIRS, reference=reference, report=say_nothing)
    assert places() == at_home
    assert all(map(torch.equal, model.parameters(), whole.parameters()))


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
