"""The command that checks a GPU, at a tiny size on the CPU: every step runs, and a wrong number ends it."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_check

TINY = gpu_check.Check(cpu=True)


@pytest.mark.parametrize(
    "only", [("versions", "kernels"), pytest.param((), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_steps_run_on_the_cpu_and_are_right(tmp_path, only):
    gpu_check.main(gpu_check.Check(cpu=True, out=tmp_path / "found.json", only=only))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"date", "device", *(only or gpu_check.STEPS)}
    assert found["kernels"]["Gemma-2-2B, window, fp32"]["relative error"] < 2e-5
    if not only:
        assert found["training"]["llama-64 im_rm --zero-stage=3 --checkpointing, resumed"]
        assert found["throughput"]["1B fp32 im_rm"]["times naive"] > 0


def test_a_wrong_number_is_named_ends_the_command_and_stands_in_the_file(tmp_path, monkeypatch):
    right = gpu_check.pair_attention

    def shifted(*states, **named):
        output, nothing = right(*states, **named)
        return output * 1.001, nothing

    monkeypatch.setattr(gpu_check, "pair_attention", shifted)
    monkeypatch.setattr(gpu_check, "_in_a_process", gpu_check.one_step)
    out = tmp_path / "found.json"
    with pytest.raises(SystemExit, match="1"):
        gpu_check.main(gpu_check.Check(cpu=True, out=out, only=("kernels", "head")))
    found = json.loads(out.read_text())
    assert found["kernels"]["wrong"] == "attention of Llama-3.2-1B in fp32: relative error 1.0e-03"
    assert "head" not in found


def test_a_missing_package_leaves_a_step_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert gpu_check.one_step(TINY, "training") == {"left out": "deepspeed is not installed"}


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (gpu_check.Check(), "no GPU is here; `--cpu`"),
        (gpu_check.Check(cpu=True, only=("kernel",)), "no step kernel; there are versions, kernels"),
    ],
)
def test_what_cannot_be_checked_is_said(check, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=said):
        gpu_check.main(check)
