"""Loading by hub id, from the hub's own cache layout and offline; what may not be loaded is refused."""

import os
import shutil
import subprocess
import sys

import pytest

from trainers.errors import ModelError
from trainers.models import load_model, load_tokenizer

REVISION = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = f"""
from trainers.models import load_model, load_tokenizer
for kind in ("ex_rm", "im_rm"):
    print(type(load_model("acme/tiny", kind=kind, precision="fp32", revision="{REVISION}")).__name__)
print(len(load_tokenizer("acme/tiny", "{REVISION}")) > 10)
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


def test_weights_that_are_not_safetensors_are_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no model could be loaded"):
        load_model(str(tmp_path / "model"), kind="im_rm", precision="fp32")


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
