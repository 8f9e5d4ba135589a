"""A trained model is an ordinary Hugging Face folder that gives the trained rewards, however it was trained and is read."""

import dataclasses
import itertools
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import trainers.train.loop
from tests.conftest import made_once, save_tiny_llama
from tests.trainers import gang
from tests.trainers.architectures import BUFFERED, random_pairs, save_architecture, small_tokenizer
from tests.trainers.gang import Job
from tests.trainers.trainings import inputs, load
from trainers.data import worlds
from trainers.data.records import Pair, user_prompt
from trainers.errors import ModelError
from trainers.evaluate.scoring import score_pairs
from trainers.models import tiny
from trainers.models.loading import load_model
from trainers.models.reward_parts import RewardModule
from trainers.models.saving import folder_files, full_weights
from trainers.models.tiny import build_tokenizer
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import tokenize_pairs
from trainers.rewards import RewardSpec, reward_variants
from trainers.specs import DrawSpec, LoraSpec, Trust
from trainers.train.card import model_card

KINDS = ("ex_rm", "im_rm")
BETA = 0.1
PAIRS = 6


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
def routed(tmp_path_factory):
    """A base model whose router has a bias correction, which is a buffer."""
    folder = tmp_path_factory.mktemp("routed")
    save_architecture("deepseek_v3", folder, vocab_size=len(build_tokenizer()))
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(bases, routed, tmp_path_factory):
    """Every reward type on both base models, at world size 2 without ZeRO and under ZeRO-3; last one with buffers."""

    def train(out):
        jobs = [
            Job(
                name=f"{kind}-{zero}-{tied}",
                model=str(base),
                out=str(out / f"{kind}-{zero}-{tied}"),
                reward={"kind": kind, "beta": BETA if kind == "im_rm" else None},
                placement={"zero_stage": zero, "world_size": 2, "forward_tokens": 1},
                optim={"lr": 1e-3, "epochs": 1, "effective_batch": 2},
                pairs=PAIRS,
            )
            for kind, zero, (tied, base) in itertools.product(KINDS, (0, 3), bases.items())
        ]
        last = {"name": "routed", "model": str(routed), "out": str(out / "routed")}
        gang.launch([*jobs, dataclasses.replace(jobs[-1], reward={"kind": "ex_rm"}, **last)], out, 2)

    return made_once(tmp_path_factory, "saved", train)


def folder_of(trained, kind, zero, tied):
    return trained / f"{kind}-{zero}-{tied}" / "model"


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


def test_no_response_can_end_in_the_pad_token(trained, bases):
    base, folder = AutoTokenizer.from_pretrained(bases[True]), folder_of(trained, "im_rm", 0, True)
    assert {pair.chosen[-1] for pair in gang.pairs_for(bases[True], PAIRS)} == {base.pad_token_id}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id != base.pad_token_id
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.chat_template


def test_the_card_of_the_mean_ablation_says_what_the_logit_is_not(tmp_path):
    card = model_card(inputs(tmp_path, (), reward=RewardSpec(kind="ex_rm", pooling="mean"))).decode()
    assert "not" in card
    assert "--reward ex_rm_mean" in card


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        *itertools.product(("ex_rm", "im_rm_no_reference", "im_rm_logits"), (False, True)),
        ("im_rm_hybrid_no_reference", False),
    ],
)
def test_the_code_of_a_card_gives_the_reward(tiny_model, tmp_path, monkeypatch, kind, adapter):
    reward = reward_variants(0.5)[kind]
    pair = Pair(prompt=user_prompt("What is 2 + 2?"), chosen="4", rejected="5")
    pairs, _ = tokenize_pairs([pair] * 2, load_tokenizer(str(tiny_model)), DrawSpec())
    lora = {"lora": LoraSpec(rank=2)} if adapter else {}
    given = inputs(tiny_model, pairs, reward=reward, name="base", dataset="sums", **lora)
    trainers.train.loop.train(given, report=lambda row: None, out_dir=tmp_path)
    folder = tmp_path / "model"
    _, head, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "peft" if adapter else "transformers",
        "base_model": "base",
        "datasets": ["sums"],
        "pipeline_tag": "text-classification" if kind == "ex_rm" else "text-generation",
        "tags": ["reward-model", "rmsweep"],
    }
    monkeypatch.chdir(folder)
    said = {}
    with torch.no_grad():
        exec(card.split("```python\n")[1].split("```")[0], said)
    model = load(folder, reward.type.output)
    expected, _ = score_pairs(RewardModule(model, reward), pairs, reference=None, report=lambda row: None)
    reads = "logits" if kind == "im_rm_logits" else "log_probs"
    found = said["reward"] if kind == "ex_rm" else 0.5 * said[reads].sum().item()
    if kind == "im_rm_hybrid_no_reference":
        classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            found += classifier(input_ids=said["ids"]).logits.item()
    assert found == pytest.approx(expected[0], abs=1e-5)
    if kind == "ex_rm" and not adapter:
        assert said["model"].config.id2label == {0: "reward"}


def train_here(folder, out, reward, pairs, precision="fp32", report=lambda row: None):
    """One epoch in this process, without a reference; the folder of the trained model."""
    given = inputs(folder, pairs, reward=reward, precision=precision)
    trainers.train.loop.train(given, report=report, out_dir=out)
    return out / "model"


EX_RM, IM_RM = RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=BETA, reference=False)


@pytest.mark.parametrize(
    ("name", "reward", "precision"),
    [
        *((name, IM_RM, "fp32") for name in BUFFERED),
        ("deepseek_v3", EX_RM, "bf16"),
    ],
    ids=lambda value: value.kind if isinstance(value, RewardSpec) else value,
)
def test_buffers_are_saved_with_the_weights(tmp_path, monkeypatch, name, reward, precision):
    save_architecture(name, tmp_path / "base")
    pairs, scores, buffers = random_pairs(), [], {}

    def score(model):
        found = score_pairs(RewardModule(model, reward), pairs, reference=None, report=lambda row: None)
        scores.append([rewards.tolist() for rewards in found])

    def scored_weights(model, **options):
        score(model)
        buffers.update(model.named_buffers())
        return full_weights(model, **options)

    monkeypatch.setattr(trainers.train.loop, "full_weights", scored_weights)
    folder = train_here(tmp_path / "base", tmp_path / "out", reward, pairs, precision)
    saved = load_file(folder / "model.safetensors")
    kept = saved.keys() & buffers.keys()
    assert kept
    assert all(torch.equal(saved[key], buffers[key]) and saved[key].dtype == torch.float32 for key in kept)
    output = reward.type.output
    score(load_model(str(folder), tokenizer=small_tokenizer(), output=output, precision=precision))
    for trained, loaded in zip(*scores, strict=True):
        assert loaded == pytest.approx(trained, abs=1e-6 if precision == "fp32" else 1e-2)


def test_zero_3_saves_buffers(trained, routed):
    saved = load_file(trained / "routed" / "model" / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(saved[name], load_file(routed / "model.safetensors")[name])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_built_in_model_keeps_its_words_when_transformers_loads_it(tmp_path, architecture):
    base = tmp_path / "base"
    tiny.pretrain(tiny.TinyModel(architecture=architecture, width=16, steps=1), base, lambda row: None)
    pairs, _ = tokenize_pairs(worlds.tiny_pairs("train"), build_tokenizer(), DrawSpec(max_pairs=4))
    for folder in (base, train_here(base, tmp_path / "out", EX_RM, pairs)):
        for found in (
            AutoTokenizer.from_pretrained(folder),
            load_tokenizer(str(folder)),
            load_tokenizer(str(folder), trust=Trust(trust_remote_code=True)),
        ):
            assert found.get_vocab() == build_tokenizer().get_vocab()
            assert tokenize_pairs(worlds.tiny_pairs("train"), found, DrawSpec(max_pairs=4))[0] == pairs
            assert found("bread zebra")["input_ids"] == build_tokenizer()("bread zebra")["input_ids"]


def test_a_tokenizer_that_is_another_one_after_a_reload_is_refused(tiny_model):
    class Shifted(PreTrainedTokenizerFast):
        def __call__(self, *args, **options):
            found = super().__call__(*args, **options)
            return {**found, "input_ids": [number + 1 for number in found["input_ids"]]}

    model = load_model(
        str(tiny_model), tokenizer=build_tokenizer(), output="head", precision="fp32", head_seed=0
    )
    with pytest.raises(ModelError, match=f"{tiny_model} is another one once it is saved.*gives other ids"):
        folder_files(model, Shifted.from_pretrained(tiny_model))


def test_what_cannot_be_saved_is_refused_before_a_training_which_it_cannot_lose_afterwards(
    tiny_model, tmp_path, monkeypatch
):
    def refuse(*args, **options):
        raise ValueError("this config cannot be saved")

    def report(row):
        monkeypatch.setattr(PreTrainedConfig, "save_pretrained", refuse)
        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)

    pairs = gang.pairs_for(tiny_model, PAIRS)
    folder = train_here(tiny_model, tmp_path / "out", EX_RM, pairs, report=report)
    assert "training accuracy" in (folder / "README.md").read_text()
    load(folder, "head")
    steps: list[object] = []
    with pytest.raises(
        ModelError, match=f"{tiny_model} can be loaded, but not saved again .this config cannot be saved"
    ):
        train_here(tiny_model, tmp_path / "again", EX_RM, pairs, report=steps.append)
    assert not steps


def test_a_generation_config_that_transformers_would_not_save_is_kept(tmp_path):
    save_architecture("llama", tmp_path / "base")
    said = {"temperature": 0.6, "do_sample": False}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(said))
    folder = train_here(tmp_path / "base", tmp_path / "out", IM_RM, random_pairs())
    config, generation = (
        json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert said.items() <= generation.items()
    assert generation["pad_token_id"] == config["pad_token_id"]
