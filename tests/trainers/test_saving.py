"""A trained model is an ordinary Hugging Face folder that gives the trained rewards, however it was trained and is read."""

import dataclasses
import itertools
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
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
    model = load(folder, reward.type.output)
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
        ("axk1", EX_RM, "fp32"),
        ("deepseek_v3", EX_RM, "fp32"),
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
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


def test_what_cannot_be_saved_is_refused_before_a_training(tiny_model, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("this config cannot be saved")

    monkeypatch.setattr(PreTrainedConfig, "save_pretrained", refuse)
    rows = []
    with pytest.raises(
        ModelError, match=f"{tiny_model} can be loaded, but not saved again .this config cannot be saved"
    ):
        train_here(tiny_model, tmp_path / "out", EX_RM, gang.pairs_for(tiny_model, PAIRS), report=rows.append)
    assert not rows


def test_after_a_training_nothing_of_transformers_can_lose_it(tiny_model, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("too late")

    def report(row):
        monkeypatch.setattr(PreTrainedConfig, "save_pretrained", refuse)
        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)

    pairs = gang.pairs_for(tiny_model, PAIRS)
    folder = train_here(tiny_model, tmp_path / "out", EX_RM, pairs, report=report)
    assert "training accuracy" in (folder / "README.md").read_text()
    load(folder, "head")


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
