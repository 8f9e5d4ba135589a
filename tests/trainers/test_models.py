"""Loading by hub id, from the hub's own cache layout and offline; what may not be loaded is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainers.trainings import load
from trainers.errors import ModelError
from trainers.models.architecture import without_weights
from trainers.pairs.templates import load_tokenizer
from trainers.specs import Trust

REVISION = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = f"""
from trainers.models.loading import load_model
from trainers.pairs.templates import load_tokenizer
tokenizer = load_tokenizer("acme/tiny", "{REVISION}")
options = dict(tokenizer=tokenizer, precision="fp32", revision="{REVISION}")
print(type(load_model("acme/tiny", output="head", head_seed=0, **options)).__name__)
print(type(load_model("acme/tiny", output="unembedding", **options)).__name__)
print(len(tokenizer) > 10)
"""


def test_a_hub_id_is_loaded_at_its_revision_from_the_cache(tiny_model, tmp_path):
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / REVISION
    shutil.copytree(tiny_model, snapshot)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["LlamaForSequenceClassification", "LlamaForCausalLM", "True"], done.stderr[
        -2000:
    ]


DAMAGE = {
    "truncated": {},
    "other shapes": {"intermediate_size": 48},
    "heads that do not fit": {"num_attention_heads": 7},
    "an activation that nobody knows": {"hidden_act": "none"},
    "a package that is not there": {"quantization_config": {"quant_method": "aqlm"}},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_transformers_cannot_load_is_refused(tiny_model, tmp_path, damage):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config, weights = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "config.json").write_text(json.dumps({**config, **DAMAGE[damage]}))
    with pytest.raises(ModelError, match=r"no (model|tokenizer) could be loaded from"):
        load(folder, "unembedding")
    if damage == "heads that do not fit":
        with pytest.raises(ModelError, match=r"no model could be built from .* is not a multiple"):
            without_weights(str(folder))


def test_a_reward_model_with_a_head_is_no_language_model(tiny_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(tmp_path)
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has a reward head, as ex_rm and im_rm_hybrid have"):
        load(tmp_path, "unembedding")


def pickled(tiny_model, folder, weights):
    """The tiny model with a pickle in the place of its safetensors."""
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_refused_unless_the_user_allows_them(tiny_model, tmp_path):
    weights = load_file(tiny_model / "model.safetensors")
    folder = pickled(tiny_model, tmp_path / "model", weights)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*--allow-pickle"):
        load(folder, "unembedding")
    found = load(folder, "unembedding", trust=Trust(allow_pickle=True)).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_an_allowed_pickle_runs_nothing_all_the_same(tiny_model, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = pickled(tiny_model, tmp_path / "model", {"lm_head.weight": Trap()})
    with pytest.raises(ModelError, match="no model could be loaded"):
        load(folder, "unembedding", trust=Trust(allow_pickle=True))
    assert not (tmp_path / "sprung").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap is armed"


def test_a_model_without_head_is_no_reward_model(tiny_model):
    with pytest.raises(ModelError, match=r"no head \(score.weight\)"):
        load(tiny_model, "head")


@pytest.mark.parametrize("output", ["head", "unembedding"])
def test_a_model_that_lacks_weights_names_them(tiny_model, tmp_path, output):
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["score.weight"] = torch.zeros(1, 32)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights.*layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        load(tmp_path / "model", output)


def test_weights_that_a_training_would_leave_as_they_are_are_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitnet"}})
    )
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weights[name] = weights[name][::4].to(torch.uint8).contiguous()
        weights[f"{name}_scale"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="holds quantised weights"):
        load(folder, "unembedding")


def test_a_tokenizer_that_cannot_be_read_is_refused(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"eos_token": 5}')
    for wrong, said in ((tmp_path, ""), (folder, ": Special token eos_token has to be")):
        with pytest.raises(ModelError, match=f"no tokenizer could be loaded from {wrong}{said}"):
            load_tokenizer(str(wrong))


def test_fp32_stays_fp32_where_an_image_asks_for_tf32(monkeypatch, tiny_model):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    torch.set_float32_matmul_precision("high")
    load(tiny_model, "unembedding")
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
