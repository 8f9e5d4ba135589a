"""The command that checks a GPU, at a tiny size on the CPU: every step runs, and a wrong number ends it."""

import json

import pytest
import torch

from benchmarks import gpu_check


def found_by(out, *only):
    gpu_check.main(gpu_check.Check(cpu=True, out=out, only=only))
    found = json.loads(out.read_text())
    assert found.keys() == {"date", "device", *(only or gpu_check.STEPS)}
    assert found["kernels"]["Gemma-2-2B, window, fp32"]["relative error"] < 2e-5
    return found


def test_steps_that_are_named_run_on_the_cpu_and_are_right(tmp_path):
    found_by(tmp_path / "found.json", "versions", "kernels")


@pytest.mark.slow
def test_every_step_runs_on_the_cpu_and_is_right(tmp_path):
    found = found_by(tmp_path / "found.json")
    assert found["training"]["llama-64 im_rm --zero-stage=3 --checkpointing, resumed"]
    assert found["throughput"]["1B fp32 im_rm"]["times naive"] > 0
    assert found["throughput"]["1B fp32 im_rm"]["kernels a step"] > 0


def test_a_wrong_number_is_named(monkeypatch):
    right = gpu_check.pair_attention

    def shifted(*states, **named):
        output, nothing = right(*states, **named)
        return output * 1.001, nothing

    monkeypatch.setattr(gpu_check, "pair_attention", shifted)
    with pytest.raises(
        gpu_check.WrongNumber, match=r"attention of Llama-3.2-1B in fp32: relative error 1.0e-03"
    ):
        gpu_check.kernels(gpu_check.Check(cpu=True))


def test_the_first_wrong_step_ends_the_command_and_stands_in_the_file(tmp_path, monkeypatch):
    answers = {"versions": {"torch": torch.__version__}, "kernels": {"wrong": "2 is not 3"}}
    monkeypatch.setattr(gpu_check, "_in_a_process", lambda check, name: answers[name])
    out = tmp_path / "found.json"
    with pytest.raises(SystemExit, match="1"):
        gpu_check.main(gpu_check.Check(cpu=True, out=out))
    found = json.loads(out.read_text())
    assert found["kernels"]["wrong"] == "2 is not 3"
    assert "head" not in found


def test_a_missing_package_leaves_a_step_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "_is_installed", lambda package: package != "deepspeed")
    gpu_check.one_step("training", "cpu")
    assert json.loads(capsys.readouterr().out) == {"left out": "deepspeed is not installed"}


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
