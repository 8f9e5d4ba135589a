"""Optimisers, schedules, clipping and freezing do what plain torch does; memory and checkpoints fail by name."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import trainers.train.loop
from tests.conftest import save_tiny_llama
from tests.trainers import gang, trainings
from tests.trainers.trainings import load
from trainers.errors import Diverged, ModelError, OutOfMemory, SpecError
from trainers.models import attention
from trainers.models.loading import freeze
from trainers.models.memory import memory_named, peak_memory
from trainers.models.reward_parts import RewardModule
from trainers.models.tiny import build_tokenizer
from trainers.pairs.packing import collate
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec, Placement
from trainers.train import engine
from trainers.train.checkpoints import Checkpoints
from trainers.train.engine import learning_rate
from trainers.train.loop import train

REWARD = RewardSpec(kind="ex_rm")


@pytest.fixture(scope="module")
def pairs(tiny_model):
    return gang.pairs_for(tiny_model, 6)


def inputs(tiny_model, pairs, optim, **changes):
    return trainings.inputs(tiny_model, pairs, optim=optim, seed=1, **changes)


def quiet(row):
    pass


def head_model(tiny_model):
    return load(tiny_model, "head", head_seed=1)


SHORT = {"epochs": 2, "effective_batch": 2}
OPTIMISERS = {
    "adamw": (OptimSpec(lr=1e-3, weight_decay=0.1, **SHORT), torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (OptimSpec(optimizer="sgd", lr=0.1, momentum=0.9, **SHORT), torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (
        OptimSpec(optimizer="rmsprop", lr=1e-3, momentum=0.5, **SHORT),
        torch.optim.RMSprop,
        {"momentum": 0.5},
    ),
    "clipped": (OptimSpec(optimizer="sgd", lr=0.1, clip=0.01, **SHORT), torch.optim.SGD, {}),
    "warm cosine": (
        OptimSpec(optimizer="sgd", lr=0.1, schedule="cosine", warmup_steps=2, **SHORT),
        torch.optim.SGD,
        {},
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_is_that_of_torch(tiny_model, pairs, tmp_path, name):
    spec, optimiser, options = OPTIMISERS[name]
    log = train(inputs(tiny_model, pairs, spec), report=quiet, out_dir=tmp_path).log
    reward = RewardModule(head_model(tiny_model), REWARD)
    plain = optimiser(reward.parameters(), lr=spec.lr, **options)
    position = {pair.index: pair for pair in pairs}
    for number, row in enumerate(log):
        plain.param_groups[0]["lr"] = learning_rate(spec, number, len(log))
        assert row["lr"] == plain.param_groups[0]["lr"]
        scores = reward(collate([position[index] for index in row["indices"]]))
        loss = F.softplus(scores.rejected_P - scores.chosen_P).mean()
        plain.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reward.parameters(), spec.clip or math.inf)
        plain.step()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert len({round(row["loss"], 6) for row in log}) > 1


def test_schedules_by_hand():
    kinds = ("constant", "linear", "cosine")
    specs = {kind: OptimSpec(lr=0.5, schedule=kind, warmup_steps=2) for kind in kinds}
    rates = {kind: [learning_rate(spec, step, 10) for step in range(10)] for kind, spec in specs.items()}
    for found in rates.values():
        assert found[:2] == [0.25, 0.5]
    assert set(rates["constant"][1:]) == {0.5}
    assert rates["linear"][2] == 0.5
    assert rates["linear"][-1] == pytest.approx(0.5 / 8)
    assert rates["cosine"][6] == pytest.approx(0.25)
    assert rates["cosine"] == sorted(rates["cosine"][:2]) + sorted(rates["cosine"][2:], reverse=True)


@pytest.mark.parametrize(
    ("part", "stays"),
    [("backbone", lambda name: name != "score.weight"), ("embeddings", lambda name: "embed" in name)],
)
def test_frozen_parts_keep_their_values(tiny_model, pairs, tmp_path, part, stays):
    spec = OptimSpec(lr=1e-2, epochs=1, effective_batch=2, freeze=(part,))
    train(inputs(tiny_model, pairs, spec), report=quiet, out_dir=tmp_path)
    after = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in head_model(tiny_model).named_parameters():
        assert torch.equal(after[name], value) == stays(name), name


def test_freezing_one_of_two_tied_matrices_unties_them(tiny_model, pairs, tmp_path):
    spec = OptimSpec(lr=1e-2, epochs=1, effective_batch=2, freeze=("unembedding",))
    im_rm = RewardSpec(kind="im_rm", beta=0.1, reference=False)
    train(inputs(tiny_model, pairs, spec, reward=im_rm), report=quiet, out_dir=tmp_path)
    before = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], before)
    assert not torch.equal(after["model.embed_tokens.weight"], before)
    again = load(tmp_path / "model", "unembedding")
    assert torch.equal(again.get_output_embeddings().weight, before)
    assert torch.equal(again.get_input_embeddings().weight, after["model.embed_tokens.weight"])


def test_what_cannot_be_frozen_is_refused(tiny_model):
    with pytest.raises(ModelError, match="no unembedding"):
        freeze(head_model(tiny_model), ("unembedding",))
    with pytest.raises(ModelError, match="nothing is left to train"):
        freeze(load(tiny_model, "unembedding"), ("backbone", "unembedding"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("freeze", ("head",)),
        ("clip", 0.0),
        ("weight_decay", math.inf),
        ("betas", (2.0, 0.9)),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(field, value):
    with pytest.raises(SpecError, match=str(value[0]) if isinstance(value, tuple) else str(value)):
        OptimSpec(**{field: value})


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_activation_checkpointing_recomputes_and_changes_nothing(
    tiny_model, pairs, tmp_path, monkeypatch, zero_stage
):
    calls, logs = [], []
    plain = attention.pair_attention

    def counted(*arguments, **options):
        calls.append(1)
        return plain(*arguments, **options)

    monkeypatch.setattr(attention, "pair_attention", counted)
    for recompute in (False, True):
        placement = Placement(forward_tokens=1, zero_stage=zero_stage, checkpointing=recompute)
        found = inputs(
            tiny_model, pairs, OptimSpec(lr=1e-3, epochs=1, effective_batch=2), placement=placement
        )
        calls.clear()
        log = train(found, report=quiet, out_dir=tmp_path / str(recompute)).log
        logs.append(([row["loss"] for row in log], len(calls)))
    assert logs[0][0] == logs[1][0]
    assert logs[1][1] == 2 * logs[0][1]


@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_layers_give_the_same_training_and_few_graphs(tiny_model, tmp_path, monkeypatch, recompute):
    # All of the compiler but its last step, which writes kernels.
    monkeypatch.setattr(engine, "COMPILER", "aot_eager")
    pairs = gang.pairs_for(tiny_model, 12)
    optim = OptimSpec(lr=1e-3, epochs=1, effective_batch=2)
    logs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        placement = Placement(forward_tokens=4096, checkpointing=recompute, compile=compiled)
        found = inputs(tiny_model, pairs, optim, placement=placement, validation=pairs[:3])
        log = train(found, report=quiet, out_dir=tmp_path / str(compiled)).log
        logs.append([(row["loss"], row["margin"], row["validation_accuracy"] or 0.0) for row in log])
        # Before and after the attention, trained and scored, and where a length happens to be that of another side.
        assert 0 < counters["stats"]["unique_graphs"] <= 12 if compiled else not counters["stats"]
    for plain, fused in zip(*logs, strict=True):
        assert fused == pytest.approx(plain, rel=1e-5, abs=1e-7)


def test_layers_are_not_compiled_where_their_weights_come_and_go():
    with pytest.raises(SpecError, match="ZeRO 0, 1 or 2"):
        Placement(forward_tokens=1, zero_stage=3, compile=True)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_diverged_training_says_where_and_writes_nothing(tiny_model, pairs, tmp_path, zero_stage):
    spec = OptimSpec(optimizer="sgd", lr=0.99, epochs=400, effective_batch=2)
    poisoned = inputs(
        tiny_model,
        pairs,
        spec,
        reward=RewardSpec(kind="im_rm", beta=1e4, reference=False),
        placement=Placement(forward_tokens=4096, zero_stage=zero_stage),
    )
    with pytest.raises(Diverged, match=r"optimiser step \d+ \(learning rate 0.99, pairs \[\d"):
        train(poisoned, report=quiet, out_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("epochs", "validation", "said"),
    [
        (1, 0, "the weights are not finite"),
        (2, 2, "validation pairs are not finite"),
    ],
)
def test_weights_that_a_last_step_spoils_are_not_saved(tiny_model, pairs, tmp_path, epochs, validation, said):
    spec = OptimSpec(lr=0.9, weight_decay=1e39, epochs=epochs, effective_batch=6)
    with pytest.raises(Diverged, match=said):
        train(inputs(tiny_model, pairs, spec, validation=pairs[:validation]), report=quiet, out_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_named(tiny_model, pairs, tmp_path, monkeypatch):
    collate_pairs = trainers.train.loop.collate

    def too_large(*arguments, **options):
        torch.empty(1 << 55, dtype=torch.uint8)
        return collate_pairs(*arguments, **options)

    monkeypatch.setattr(trainers.train.loop, "collate", too_large)
    with pytest.raises(OutOfMemory, match=r"a forward of up to \d+ tokens") as raised:
        train(inputs(tiny_model, pairs, OptimSpec(effective_batch=2)), report=quiet, out_dir=tmp_path)
    lengths = sorted(pair.tokens for pair in pairs)
    assert raised.value.forward_tokens == max(lengths[-1], sum(lengths[-2:]) // 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "said",
    ["CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "NCCL Error 1: Failed to CUDA calloc 6 bytes"],
)
def test_memory_that_runs_out_in_a_library_of_cuda_is_named_too(said):
    with pytest.raises(OutOfMemory, match="too large") as raised, memory_named("too large", forward_tokens=7):
        raise RuntimeError(said)
    assert raised.value.forward_tokens == 7


def test_a_checkpoint_of_another_training_is_refused(tiny_model, pairs, tmp_path):
    kept = Checkpoints(folder=tmp_path / "kept", every_steps=1)
    save_tiny_llama(tmp_path / "other", build_tokenizer(), seed=1, tied=True)
    spec = OptimSpec(lr=1e-3, epochs=1, effective_batch=2)
    train(inputs(tiny_model, pairs, spec), report=quiet, out_dir=tmp_path / "first", checkpoints=kept)
    others = [
        (
            ModelError,
            r"another training \(architecture: LlamaForSequenceClassification",
            {"reward": RewardSpec(kind="im_rm", beta=0.1, reference=False)},
        ),
        (
            ModelError,
            r"another training \(pairs: ",
            {"pairs": [dataclasses.replace(pairs[0], chosen=[5]), *pairs[1:]]},
        ),
        (ModelError, r"another training \(base model: ", {"location": str(tmp_path / "other")}),
        (SpecError, "--zero-stage 0", {"placement": Placement(forward_tokens=4096, zero_stage=1)}),
    ]
    for error, message, changes in others:
        changed = inputs(tiny_model, **{"pairs": pairs, "optim": spec, **changes})
        with pytest.raises(error, match=message):
            train(changed, report=quiet, out_dir=tmp_path / "second", checkpoints=kept)
    assert not (tmp_path / "second").exists()


def test_a_reference_computed_again_by_other_threads_is_that_of_the_same_training(
    tiny_model, pairs, tmp_path
):
    kept, spec = Checkpoints(folder=tmp_path / "kept", every_steps=2), OptimSpec(epochs=1, effective_batch=2)
    for shift in (0.0, 1e-6):
        said, sums = list[dict](), {pair.index: (-9.0 + shift, -9.0) for pair in pairs}
        one = inputs(tiny_model, pairs, spec, reward=RewardSpec(kind="im_rm", beta=0.1), reference=sums)
        train(one, report=said.append, out_dir=tmp_path / str(shift), checkpoints=kept)
    assert said[0] == {"notice": "resumed at step 2 of 3"}


def test_the_peak_of_a_gpu_is_what_was_reserved_beside_what_was_filled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2e9)
    assert peak_memory() == {"peak_mem_gb": 3.0, "allocated_gb": 2.0}
