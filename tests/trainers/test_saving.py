"""A trained model is an ordinary Hugging Face folder that gives the trained rewards, however it was trained and is read."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.conftest import save_tiny_llama
from tests.trainers import gang
from tests.trainers.gang import Job
from trainers.evaluate import score_pairs
from trainers.models import load_model
from trainers.rewards import RewardSpec
from trainers.saving import model_card
from trainers.scoring import RewardModule
from trainers.templates import load_tokenizer
from trainers.tiny import build_tokenizer

KINDS = ("ex_rm", "im_rm", "ex_grm")
BETA = 0.1
PAIRS = 6


def spec(kind: str) -> RewardSpec:
    return RewardSpec(kind=kind, beta=BETA if kind == "im_rm" else None, reference=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tied and untied base models whose tokenizer pads with the token that ends every turn."""
    folders = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        tokenizer = build_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        eos = tokenizer.eos_token_id
        save_tiny_llama(folder, tokenizer, seed=5, tied=tied, pad_token_id=eos, eos_token_id=eos)
        folders[tied] = folder
    return folders


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    """Every reward type on both base models, at world size 2 without ZeRO and under ZeRO-3."""
    out = tmp_path_factory.mktemp("saved")
    jobs = [
        Job(
            name=f"{kind}-{zero}-{tied}",
            model=str(base),
            out=str(out / f"{kind}-{zero}-{tied}"),
            reward={"kind": kind, "beta": BETA if kind == "im_rm" else None},
            placement={"zero_stage": zero, "world_size": 2, "micro_batch": 1, "accumulation": 1},
            optim={"lr": 1e-3, "epochs": 1, "effective_batch": 2},
            pairs=PAIRS,
        )
        for kind in KINDS
        for zero in (0, 3)
        for tied, base in bases.items()
    ]
    gang.launch(jobs, out, 2)
    return out


def folder_of(trained, kind, zero, tied):
    return trained / f"{kind}-{zero}-{tied}" / "model"


def rows(pairs, side):
    return [pair.prompt + getattr(pair, side) for pair in pairs]


def padded(tokenizer, ids):
    return tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_alone_gives_the_trained_rewards_in_a_padded_batch(trained, bases, kind, zero, tied):
    folder = folder_of(trained, kind, zero, tied)
    pairs = gang.pairs_for(bases[tied], PAIRS)
    reward = spec(kind)
    model = load_model(
        str(folder), tokenizer=load_tokenizer(str(folder)), output=reward.type.output, precision="fp32"
    )
    nothing = {pair.index: (0.0, 0.0) for pair in pairs}
    chosen, rejected = score_pairs(
        RewardModule(model, reward), pairs, reference=nothing, report=lambda row: None
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for side, expected in (("chosen", chosen), ("rejected", rejected)):
        found = plain_rewards(folder, tokenizer, kind, pairs, side)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


def plain_rewards(folder, tokenizer, kind, pairs, side):
    """As a user of transformers would compute them."""
    ids = rows(pairs, side)
    batch = padded(tokenizer, ids)
    with torch.no_grad():
        if kind == "ex_rm":
            model = AutoModelForSequenceClassification.from_pretrained(folder)
            assert model.config.num_labels == 1
            return model(**batch).logits[:, 0]
        logits = AutoModelForCausalLM.from_pretrained(folder)(**batch).logits.log_softmax(-1)
    if kind == "im_rm":
        sums = []
        for number, pair in enumerate(pairs):
            at = range(len(pair.prompt), len(ids[number]))
            sums.append(sum(logits[number, place - 1, ids[number][place]] for place in at))
        return BETA * torch.stack(sums)
    yes = [pair.chosen[-1] for pair in pairs]
    return torch.stack([logits[n, len(ids[n]) - 2, yes[n]].exp() for n in range(len(pairs))])


@pytest.mark.parametrize("kind", KINDS)
def test_zero_3_saves_what_no_zero_saves(trained, kind):
    for tied in (True, False):
        plain, partitioned = (
            load_file(folder_of(trained, kind, zero, tied) / "model.safetensors") for zero in (0, 3)
        )
        assert plain.keys() == partitioned.keys()
        assert ("lm_head.weight" in plain) == (kind != "ex_rm" and not tied)
        for name in plain:
            assert (plain[name] - partitioned[name]).norm() <= 1e-4 * plain[name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_no_response_can_end_in_the_pad_token(trained, bases, kind):
    folder = folder_of(trained, kind, 0, True)
    pad = json.loads((folder / "config.json").read_text())["pad_token_id"]
    ends = {
        row[-1] for side in ("chosen", "rejected") for row in rows(gang.pairs_for(bases[True], PAIRS), side)
    }
    assert ends == {AutoTokenizer.from_pretrained(bases[True]).pad_token_id}
    assert pad not in ends
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == pad


def test_a_folder_holds_template_and_card(trained):
    folder = folder_of(trained, "ex_rm", 3, False)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    card = (folder / "README.md").read_text()
    assert "training accuracy" in card
    assert "AutoModelForSequenceClassification" in card


def test_the_card_of_the_mean_ablation_says_what_the_logit_is_not():
    card = model_card("base", RewardSpec(kind="ex_rm", pooling="mean"), {})
    assert "not" in card
    assert "--reward ex_rm_mean" in card
