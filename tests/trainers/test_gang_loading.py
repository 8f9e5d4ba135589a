"""A gang reads its model once, and under ZeRO 3 no rank holds the whole: the same training, and how much memory it takes."""

import functools
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainers import gang
from tests.trainers.gang import Job
from trainers.errors import ModelError
from trainers.models.memory import forget_peak_memory, peak_memory
from trainers.models.reward_parts import RewardModule
from trainers.specs import OptimSpec, Placement
from trainers.train import engine, loop
from trainers.train.checkpoints import together

EX_RM, IM_RM = {"kind": "ex_rm"}, {"kind": "im_rm", "beta": 0.1}
HYBRID = {"kind": "im_rm_hybrid", "beta": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "head": {"reward": EX_RM},
    "tied matrices, one frozen, in bf16": {
        "reward": IM_RM,
        "precision": "bf16",
        "optim": {"freeze": ("embeddings",)},
    },
    "new rows": {"reward": IM_RM, "model": "no template"},
    "adapter": {"reward": EX_RM, "lora": {"rank": 2}},
    "ZeRO 0": {"reward": IM_RM, "zero_stage": 0},
    "both outputs, ZeRO 0": {"reward": HYBRID, "zero_stage": 0},
}


def job(case: str, models: dict[str, str], out: Path) -> Job:
    asked = CASES[case]
    return Job(
        name=case,
        model=models[asked.get("model", "")],
        out=str(out / case),
        reward=asked["reward"],
        placement={"world_size": 2, "zero_stage": asked.get("zero_stage", 3), "forward_tokens": 600},
        optim={"lr": 1e-3, "epochs": 2, "effective_batch": 4, **asked.get("optim", {})},
        pairs=6,
        precision=asked.get("precision", "fp32"),
        lora=asked.get("lora"),
        partitions_all=True,
    )


def trained_both_ways(models: dict[str, str], folder: Path) -> dict[str, Any]:
    found = {}
    for case in CASES:
        found[case] = gang._run(job(case, models, folder / "once"))["log"]
        with pytest.MonkeyPatch.context() as patch:
            # What DeepSpeed does with a model that every rank has read.
            patch.setattr(loop, "load_once", lambda load: load({}))
            patch.setattr(engine, "_partition", lambda *others: None)
            found[f"{case}, by all"] = gang._run(job(case, models, folder / "by all"))["log"]
    return found


@pytest.fixture
def models(tiny_model, tmp_path) -> dict[str, str]:
    """The tiny model, and the same without markers of conversations, which are given rows."""
    bare = shutil.ignore_patterns("chat_template.jinja")
    plain = shutil.copytree(tiny_model, tmp_path / "plain", ignore=bare)
    return {"": str(tiny_model), "no template": str(plain)}


def test_what_one_rank_reads_is_trained_as_what_all_read(models, tmp_path):
    logs = gang.together(functools.partial(trained_both_ways, models, tmp_path), tmp_path / "gang", 2)
    for case in CASES:
        once, by_all = (
            [(row["loss"], row["margin"], row["grad_norm"]) for row in logs[name]]
            for name in (case, f"{case}, by all")
        )
        assert once == by_all, case
        file = "adapter_model.safetensors" if "lora" in CASES[case] else "model.safetensors"
        weights, expected = (load_file(tmp_path / way / case / "model" / file) for way in ("once", "by all"))
        assert weights.keys() == expected.keys(), case
        assert all(torch.equal(weights[name], expected[name]) for name in weights), case


def load(folder: Path, known: Any) -> Any:
    """Load a model with a new head; of a tokenizer all that is asked for is its length."""
    return loop.load_model(
        str(folder), tokenizer=range(16), output="head", precision="fp32", head_seed=0, known=known
    )


class Begun(Exception):
    pass


def grown(folder: Path) -> list[float]:
    """By how many bytes each rank's memory grew at the most from before loading to when its part is all it holds."""

    def begin(**options: Any) -> None:
        raise Begun

    with engine.process_group(), pytest.MonkeyPatch.context() as patch:
        # Layouts are tried, and libraries loaded, before it counts.
        load(folder, {})
        forget_peak_memory()
        before = peak_memory()["peak_mem_gb"]
        model = engine.load_once(functools.partial(load, folder))
        patch.setattr(deepspeed, "initialize", begin)
        with pytest.raises(Begun):
            engine.make_engine(
                RewardModule(model, gang.EX_RM),
                optim=OptimSpec(),
                placement=Placement(world_size=2, zero_stage=3, forward_tokens=1),
                precision="fp32",
            )
        return together(lambda: (peak_memory()["peak_mem_gb"] - before) * 1e9)


def test_ranks_hold_their_part_and_one_of_them_the_checkpoint(tmp_path):
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 1e8
    reads, receives = gang.together(functools.partial(grown, tmp_path / "model"), tmp_path / "gang", 2)
    # Half is its part; the rest is the tensor that is under way, and what else a process does.
    assert receives < 0.75 * size
    assert reads < receives + 1.1 * size


def sums_of(model: Any) -> dict[str, float]:
    return {name: float(weight.detach().double().sum()) for name, weight in model.named_parameters()}


def refused_and_read(folder: Path, wrong: list[Path]) -> tuple[list[list[str]], list[dict[str, float]]]:
    """What each rank says to each wrong folder, and reads where one that does not read makes room for another type."""

    def said(folder: Path) -> str:
        with pytest.raises(ModelError) as refused:
            engine.load_once(functools.partial(load, folder))
        return str(refused.value)

    def otherwise(known: Any) -> Any:
        model = load(folder, known)
        return model.bfloat16() if known else model

    with engine.process_group():
        refusals = [together(functools.partial(said, folder)) for folder in wrong]
        model = engine.load_once(otherwise)
        return refusals, together(lambda: sums_of(model))


def test_every_rank_refuses_what_one_finds_wrong_and_reads_what_it_would_build_otherwise(
    tiny_model, tmp_path
):
    weights = load_file(tiny_model / "model.safetensors")
    norm = "model.norm.weight"
    lacks = {name: weight for name, weight in weights.items() if name != norm}
    wrong = {tmp_path / "lacks": lacks, tmp_path / "short": {**weights, norm: weights[norm][:3]}}
    alone = []
    for folder, changed in wrong.items():
        shutil.copytree(tiny_model, folder)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as refused:
            load(folder, {})
        alone.append(str(refused.value))
    asked = functools.partial(refused_and_read, tiny_model, [*wrong])
    refusals, read = gang.together(asked, tmp_path / "gang", 2)
    assert refusals == [[said, said] for said in alone]
    assert read == [sums_of(load(tiny_model, {}))] * 2
