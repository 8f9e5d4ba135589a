"""An adapter is trained as peft's own, on every placement; it is saved in peft's form, resumed, merged and scored."""

import dataclasses
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import found_once
from tests.trainers import gang, naive, trainings
from tests.trainers.architectures import load_untrained, save_architecture
from tests.trainers.gang import Job
from trainers.errors import ModelError
from trainers.evaluate.scoring import score_pairs
from trainers.models.adapters import add_adapter, linear_names
from trainers.models.architecture import without_weights
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import epoch_order, steps_of_epoch
from trainers.pairs.templates import load_tokenizer
from trainers.rewards.losses import pair_loss
from trainers.specs import LoraSpec, LossSpec

PAIRS, EFFECTIVE_BATCH, EPOCHS, LR = 9, 4, 2, 1e-2
LORA = LoraSpec(rank=4, alpha=8.0)
REWARDS = {"ex_rm": gang.EX_RM, "im_rm": gang.IM_RM}
# One of the two is trained with all that a loss can have.
LOSSES = {"ex_rm": LossSpec(), "im_rm": LossSpec(margin=0.2, label_smoothing=0.1, centring=0.05)}
RUNS = [("ex_rm", 0, 1), *((kind, zero, 2) for kind in REWARDS for zero in range(4))]
# Of checkpoints that ranks have a part of, and that they have not.
RESUMED = (0, 3, *(pytest.param(zero, marks=pytest.mark.slow) for zero in (1, 2)))


def job(model, folder, kind, zero, world, **options):
    reward, loss = REWARDS[kind], LOSSES[kind]
    fields = {
        "name": f"{kind}-{zero}-{world}",
        "model": str(model),
        "out": str(folder / f"{kind}-{zero}-{world}"),
        "reward": {"kind": kind, "beta": reward.beta},
        "placement": {
            "zero_stage": zero,
            "world_size": world,
            "forward_tokens": (1, 300, 1, 600)[zero],
            "checkpointing": zero in (1, 3),
        },
        "optim": {"lr": LR, "epochs": EPOCHS, "effective_batch": EFFECTIVE_BATCH},
        "pairs": PAIRS,
        "partitions_all": zero == 3,
        "lora": {"rank": LORA.rank, "alpha": LORA.alpha},
        "loss": dataclasses.asdict(loss),
    }
    return Job(**{**fields, **options})


def load(folder, kind, **options):
    return trainings.load(folder, REWARDS[kind].type.output, **options)


def naive_training(folder, kind):
    """Losses and trained weights of peft's model under plain AdamW, one row at a time."""
    pairs, spec, loss_spec = gang.pairs_for(folder, PAIRS), REWARDS[kind], LOSSES[kind]
    plain = naive.plain(load(folder, kind, head_seed=gang.SEED))
    reference = naive.reference(plain, pairs) if spec.uses_reference else None
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(plain, LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets))
    model = adapted.get_base_model()
    if kind == "ex_rm":
        model.score.requires_grad_(True)
    begun = dict(load(folder, kind, head_seed=gang.SEED, lora=LORA).named_parameters())
    trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
    assert trained.keys() == {name for name, item in begun.items() if item.requires_grad}
    with torch.no_grad():
        for name, item in trained.items():
            item.copy_(begun[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0)
    losses = []
    for epoch in range(EPOCHS):
        for step in steps_of_epoch(epoch_order(PAIRS, gang.SEED, epoch), EFFECTIVE_BATCH):
            optimizer.zero_grad()
            total = 0.0
            for position in step:
                chosen, rejected, _ = naive.rewards(model, spec, [pairs[position]], reference)
                margin = torch.tensor([pairs[position].margin])
                loss = pair_loss(chosen, rejected, loss_spec, margin) / len(step)
                loss.sum().backward()
                total += loss.item()
            optimizer.step()
            losses.append(total)
    return losses, {name: item.detach() for name, item in trained.items()}


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    def find(folder):
        found = {}
        for world in (1, 2):
            jobs = [job(tiny_model, folder, *run) for run in RUNS if run[2] == world]
            found |= gang.launch(jobs, folder / f"gang{world}", world)
        return found

    return found_once(tmp_path_factory, "lora", find)


@pytest.mark.parametrize("kind", REWARDS)
def test_every_placement_trains_the_adapter_as_peft_does(runs, tiny_model, kind):
    folder, found = runs
    losses, weights = naive_training(tiny_model, kind)
    for name in (f"{kind}-{zero}-{world}" for reward, zero, world in RUNS if reward == kind):
        assert [row["loss"] for row in found[name]["log"]] == pytest.approx(losses, abs=1e-5), name
        saved = load_file(folder / name / "model" / "adapter_model.safetensors")
        assert len(saved) == len(weights)
        for key, weight in weights.items():
            there = saved["base_model.model." + key.replace(".default", "")]
            assert (there - weight).norm() <= 1e-3 * weight.norm(), (name, key)


def test_the_first_margin_of_im_rm_is_zero(runs):
    _, found = runs
    # Of a log-ratio that is 0 both rewards are, and the loss is that of the pairs' margins alone.
    assert {found[f"im_rm-{zero}-2"]["log"][0]["margin"] for zero in range(4)} == {0.0}


def rewards_of(model, kind, pairs, reference):
    return score_pairs(
        RewardModule(model, REWARDS[kind]), pairs, reference=reference, report=lambda row: None
    )


@pytest.mark.parametrize("kind", REWARDS)
def test_a_saved_adapter_scores_alike_by_rmsweep_by_peft_and_merged(runs, tiny_model, tmp_path, kind):
    folder, _ = runs
    pairs = gang.pairs_for(tiny_model, 5)
    base = load(tiny_model, kind, head_seed=gang.SEED)
    reference = naive.reference(naive.plain(base), pairs) if kind == "im_rm" else None
    saved = folder / f"{kind}-3-2" / "model"
    ours = rewards_of(load(saved, kind), kind, pairs, reference)
    elsewhere = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    moved = rewards_of(load(saved, kind, base=(str(elsewhere), None)), kind, pairs, reference)
    assert [side.tolist() for side in moved] == [side.tolist() for side in ours]
    assert abs(ours[0] - ours[1]).max() > 1e-2
    auto, options = (
        (AutoPeftModelForSequenceClassification, {"num_labels": 1})
        if kind == "ex_rm"
        else (AutoPeftModelForCausalLM, {})
    )
    theirs = auto.from_pretrained(saved, **options).eval().merge_and_unload()
    with torch.no_grad():
        chosen, rejected, _ = naive.rewards(theirs, REWARDS[kind], pairs, reference)
    assert chosen.tolist() == pytest.approx(ours[0].tolist(), abs=1e-5)
    assert rejected.tolist() == pytest.approx(ours[1].tolist(), abs=1e-5)


def test_a_merged_adapter_is_an_ordinary_model_with_the_same_rewards(runs, tiny_model, tmp_path):
    folder, _ = runs
    gang.launch([job(tiny_model, tmp_path, "ex_rm", 3, 2, merge=True)], tmp_path / "gang", 2)
    pairs = gang.pairs_for(tiny_model, 5)
    whole = load(tmp_path / "ex_rm-3-2" / "model", "ex_rm")
    assert not any("lora" in name for name, _ in whole.named_parameters())
    found = rewards_of(whole, "ex_rm", pairs, None)
    expected = rewards_of(load(folder / "ex_rm-3-2" / "model", "ex_rm"), "ex_rm", pairs, None)
    for side, other in zip(found, expected, strict=True):
        assert side.tolist() == pytest.approx(other.tolist(), abs=1e-5)


@pytest.fixture(scope="module", params=RESUMED)
def resumed(request, tiny_model, tmp_path_factory):
    """A ZeRO stage and a training cut short at world size 2: its checkpoints, what went on there, and alone."""
    zero = request.param

    def find(folder):
        found = {}
        for place, world, options in (("kept", 2, {"stop_after": 3}), ("again", 2, {}), ("alone", 1, {})):
            checkpoints = folder / place / "checkpoints"
            if found:
                shutil.copytree(folder / "kept" / "checkpoints", checkpoints)
            options["checkpoints"] = str(checkpoints)
            cut = job(tiny_model, folder / place, "im_rm", zero, world, **options)
            found[place] = gang.launch([cut], folder / f"gang-{place}", world)
        return found

    return zero, *found_once(tmp_path_factory, f"resumed-{zero}", find)


def test_a_resumed_adapter_is_bit_for_bit_and_at_another_world_size_within_1e_5(runs, resumed):
    (folder, whole), (zero, other, found) = runs, resumed
    files = (other / "kept" / "checkpoints").rglob("*model_states.pt")
    states = [torch.load(file, weights_only=False) for file in files]
    names = {name for state in states for name in state["module"] or ()}
    # A checkpoint holds no frozen weight; of two tied tables, DeepSpeed knows only one as frozen.
    assert names
    assert {name for name in names if ".lora_" not in name} <= {"model.lm_head.weight"}
    assert not any(state.get("frozen_param_fragments") for state in states)
    name = f"im_rm-{zero}-2"
    expected = [row["loss"] for row in whole[name]["log"]]
    assert found["kept"][name]["log"] is None
    assert [row["loss"] for row in found["again"][name]["log"]] == expected
    there = [place / name / "model" / "adapter_model.safetensors" for place in (folder, other / "again")]
    weights = [load_file(file) for file in there]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    alone = [row["loss"] for row in found["alone"][f"im_rm-{zero}-1"]["log"]]
    assert alone == pytest.approx(expected, abs=1e-5)


def test_layers_that_are_not_there_are_told_with_those_that_are(tiny_model):
    with pytest.raises(
        ModelError, match=r"no linear layers called qkv; name some of --lora-targets .*q_proj"
    ):
        load(tiny_model, "ex_rm", head_seed=0, lora=LoraSpec(rank=2, targets=("q_proj", "qkv")))
    names = adapted(load(tiny_model, "im_rm"), targets=("q_proj",))
    assert names
    assert all(name.endswith(".q_proj") for name in names)


class Router(torch.nn.Linear):
    """A linear layer that gives something else."""

    def forward(self, hidden):
        return super().forward(hidden).topk(1)


def adapted(model, **options):
    add_adapter(model, LoraSpec(rank=2, **options), base="here")
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


def test_layers_that_do_something_else_or_share_their_weights_get_no_adapter(tiny_model):
    model = load(tiny_model, "im_rm")
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    first.q_proj.weight = second.q_proj.weight
    first.k_proj.__class__ = Router
    model.lm_head.__class__ = torch.nn.Linear
    # A layer without a name is not taken for one of the model.
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    names = adapted(model)
    assert {"model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj.0"} <= names
    assert not [name for name in names if name.endswith(("q_proj", "layers.0.self_attn.k_proj", "lm_head"))]


def test_what_peft_would_put_on_experts_or_refuses_is_told(tmp_path):
    experts, state = (tmp_path / name for name in ("experts", "state"))
    save_architecture("deepseek_v3", experts)
    names = adapted(load_untrained(experts, "unembedding"))
    # Before a training they are told from a model without weights.
    assert {name.rpartition(".")[2] for name in names} == {*linear_names(without_weights(str(experts)))}
    assert not [name for name in names if "mlp" in name]
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(state)
    with pytest.raises(
        ModelError, match=r"here: .*'out_proj' is incompatible.*name some of --lora-targets dt_proj"
    ):
        adapted(load_untrained(state, "unembedding"))
    assert adapted(load_untrained(state, "head"), targets=("in_proj",)) == {"backbone.layers.0.mixer.in_proj"}


def test_an_adapter_that_would_have_to_hold_rows_for_markers_is_refused(tiny_model, tmp_path):
    bare = shutil.ignore_patterns("chat_template.jinja")
    folder = shutil.copytree(tiny_model, tmp_path / "bare", ignore=bare)
    assert len(load_tokenizer(str(folder))) > len(load_tokenizer(str(tiny_model)))
    with pytest.raises(ModelError, match=r"no rows for the markers .* train it without --lora-rank"):
        load(folder, "ex_rm", head_seed=0, lora=LORA)


@pytest.mark.parametrize("kind", REWARDS)
def test_an_adapter_that_peft_trained_and_saved_is_read(tiny_model, tmp_path, kind):
    head = kind == "ex_rm"
    plain = naive.plain(load(tiny_model, kind, **({"head_seed": 0} if head else {})))
    task = "SEQ_CLS" if head else "CAUSAL_LM"
    config = LoraConfig(r=2, task_type=task, target_modules=["q_proj"], use_rslora=True, lora_dropout=0.5)
    adapted = get_peft_model(plain, config).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape)
    adapted.save_pretrained(tmp_path)
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path)
    found = naive.plain(load(tmp_path, kind, base=(str(tiny_model), None)))
    ids = torch.tensor([[2, 5, 9, 7]])
    assert torch.equal(found(input_ids=ids).logits, adapted(input_ids=ids).logits)
