"""TF32 is asked for by the model that was loaded in it, while it computes, and by nothing else."""

import contextlib

import pytest
import torch

import trainers.train.loop
from tests.trainers import gang, trainings
from trainers.errors import SpecError
from trainers.evaluate.scoring import compute_reference, score_pairs
from trainers.models import unembedding
from trainers.models.loading import load_model
from trainers.models.products import products_of
from trainers.models.reward_parts import RewardModule
from trainers.rewards import RewardSpec
from trainers.specs import Placement
from trainers.train.loop import train


@pytest.fixture
def in_tf32(tiny_model, monkeypatch):
    """A model that was loaded in tf32, as on a GPU."""
    with monkeypatch.context() as there_is_one:
        there_is_one.setattr(torch.cuda, "is_available", lambda: True)
        return trainings.load(tiny_model, "unembedding", "tf32")


def rounding() -> str:
    return torch.get_float32_matmul_precision()


@pytest.fixture
def seen(monkeypatch):
    """How products are rounded whenever logits are computed, forward and backward."""
    found, real = [], unembedding._product

    def product(left, right):
        found.append(rounding())
        return real(left, right)

    monkeypatch.setattr(unembedding, "_product", product)
    return found


def test_on_a_cpu_it_is_refused_before_weights_are_read(tiny_model):
    with pytest.raises(SpecError, match="only a GPU has TF32"):
        load_model("nowhere", tokenizer=None, output="head", precision="tf32")


def test_scoring_and_the_reference_pass_ask_for_it_and_give_it_back(in_tf32, tiny_model, seen):
    pairs = gang.pairs_for(tiny_model, 2)
    assert rounding() == "highest"
    reference = compute_reference(in_tf32, pairs, report=lambda row: None)
    score_pairs(
        RewardModule(in_tf32, gang.IM_RM), pairs, reference=reference, report=lambda row: assert_rounding()
    )
    assert set(seen) == {"high"}
    with contextlib.suppress(RuntimeError), products_of(in_tf32):
        assert rounding() == "high"
        raise RuntimeError
    assert rounding() == "highest"
    in_tf32.tf32 = False
    seen.clear()
    compute_reference(in_tf32, pairs, report=lambda row: None)
    assert set(seen) == {"highest"}


def assert_rounding() -> None:
    """Whoever is told of progress computes as before."""
    assert rounding() == "highest"


def test_a_training_asks_for_it_in_both_passes_and_gives_it_back(tiny_model, tmp_path, monkeypatch, seen):
    def in_tf32(*arguments, **options):
        model = load_model(*arguments, **options)
        model.tf32 = True
        return model

    monkeypatch.setattr(trainers.train.loop, "load_model", in_tf32)
    passes, backward = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor,
        "backward",
        lambda *args, **options: (passes.append(rounding()), backward(*args, **options)),
    )
    pairs = gang.pairs_for(tiny_model, 4)
    inputs = trainings.inputs(
        tiny_model,
        pairs,
        reward=RewardSpec(kind="im_rm", beta=0.1, reference=False),
        placement=Placement(forward_tokens=1),
        validation=pairs[:1],
    )
    train(inputs, report=lambda row: assert_rounding(), out_dir=tmp_path)
    assert passes == ["high"] * 4
    assert set(seen) == {"high"}
    assert rounding() == "highest"
