"""`plan`: what would run where, how long and at what price; offline, and refused where its words are wrong."""

import json
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from huggingface_hub import constants

from orchestrator.cli.main import Grid, main
from sweeps.full_grid import full_grid
from tests.loopback import Loopback, Quiet, ask_at

ROOT = Path(__file__).resolve().parent.parent.parent
GRID = ROOT / "sweeps" / "full_grid.py"
PAPER = ("plan", "--profile", "paper", "--cluster", "2x8xH100-80GB")


@pytest.fixture
def grid(tmp_path, monkeypatch, capsys):
    """Run the command in this process and an empty folder, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        with pytest.raises(SystemExit) as ended:
            main(Grid(build=full_grid), GRID, arguments=arguments)
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())

    return run


def test_the_papers_grid_is_planned_offline(grid, tmp_path):
    done = grid(*PAPER)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for part in (
        "72 trials on 2 × 8 × H100-80GB",
        "train 72 to do, 0 cached",
        "GPU-hours on 16 GPUs",
        "never under",
        "per GPU-hour (assumed: AWS on demand",
        "not fetched: gemma-2-2b, llama-3.1-8b",
        "llama-3.1-8b · ex_rm bf16 4, ZeRO 2",
        "trained on ultrafeedback, evaluated on ultrafeedback (in-distribution), ultrafeedback_paraphrase, "
        "ultrafeedback_french, ultrafeedback_spanish (token-level shift), rewardbench_math, rewardbench_code, rewardmath "
        "(domain shift)",
    ):
        assert part in said
    # Nothing is started, and nothing is written.
    assert list(tmp_path.iterdir()) == []


def test_json_says_the_same_in_numbers(grid):
    found = json.loads(grid(*PAPER, "--json", "--price", "2").stdout)
    assert (found["devices"], found["unit"], len(found["trials"]), len(found["cells"])) == (16, "GPU", 72, 12)
    assert found["categories"]["rewardmath"]["in-distribution"] == ["rewardmath"]
    for cell in found["cells"]:
        big = cell["model"] == "llama-3.1-8b"
        assert cell["train_sets"] == ["ultrafeedback", "rewardmath"]
        assert (cell["precision"], cell["effective_batch"]) == ("bf16" if big else "fp32", 32)
        assert cell["placement"]["world_size"] == 4 or not big
        assert 0 < cell["peak_gb"] <= cell["gpu_gb"] == 80
        assert cell["step_s"] > 0
        assert (cell["measured"], cell["why"]) == (False, "")
    # Six models, two training sets, seven evaluation sets; the shared stages once.
    assert found["stages"]["train"] == {"cached": 0, "missing": 72}
    assert found["stages"]["reference"]["missing"] < 72
    assert found["lower_bound_h"] <= found["makespan_h"]
    assert found["price"] == pytest.approx(2 * found["device_hours"])
    assert found["price_held"] == pytest.approx(2 * 16 * found["makespan_h"])
    assert "llama-3.2-1b" in found["not_fetched"]


def test_a_row_of_the_papers_grid_is_a_line_on_a_terminal_of_80_columns(grid, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table, alike, _ = grid(*PAPER).stdout.partition(
        "all alike: trained on ultrafeedback, rewardmath; trials 6; batch 32; to do"
    )
    rows = [line for line in table.splitlines() if "_rm" in line]
    assert alike
    assert len(rows) == 12
    assert all(len(line) <= 80 and len(line.split()) == 11 for line in rows)


def test_the_laptop_is_planned_on_this_machines_cpus_and_each_row_names_its_training_set(grid):
    # Inline, so that a Ray that happens to run here is not asked. Of the sets one is trained on two processes.
    words = ("plan", "--profile", "laptop", "--backend", "inline", "--models", "gemma2-64", "--train-sets")
    words += ("tiny_world", "hamiltonian")
    said = " ".join(grid(*words).stdout.split())
    for train_set, devices in (("tiny_world", "2, ZeRO 3"), ("hamiltonian", "1, ZeRO 0")):
        assert f"gemma2-64 · ex_rm {train_set} {devices}" in said
    found = json.loads(grid(*words, "--json").stdout)
    assert (found["unit"], found["price"]) == ("CPU", None)
    assert found["stages"]["pretrain"] == {"cached": 0, "missing": 1}


def test_what_does_not_fit_is_said_with_what_would(grid):
    done = grid("plan", "--profile", "paper", "--cluster", "1x1xL4-24GB@0.5")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert "does not fit: llama-3.1-8b · im_rm needs" in said
    assert "It would fit on 2 GPUs of 24 GB" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan --cluster 2x8xQ100", "'Q100'"),
        ("plan --cluster nonsense", "'nonsense' is not NODESxGPUSxKIND"),
        ("plan --cluster nowhere.yaml", "nowhere.yaml: it cannot be read"),
        ("plan --cluster 1x1xH100 --price -1", "--price -1"),
        ("--cluster 1x1xH100 --backend inline", "there is no Ray cluster to run on"),
    ],
)
def test_bad_words_are_refused(grid, tmp_path, arguments, message):
    done = grid(*arguments.split(), "--profile", "laptop")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


class _Hub(Quiet):
    """A hub where every llama is gated, one Qwen is not there, and the rest is free."""

    def do_GET(self) -> None:
        error = (
            "GatedRepo" if "meta-llama" in self.path else "RepoNotFound" if "Qwen2.5-3B" in self.path else ""
        )
        self.send_response({"GatedRepo": 403, "RepoNotFound": 404}.get(error, 200))
        for name, value in {"X-Error-Code": error, "Content-Length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"{}")


def test_models_that_the_hub_denies_are_named_in_one_message(grid, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with closing(Loopback(_Hub)) as hub:
        ask_at(hub.url, monkeypatch)
        denied = json.loads(grid(*PAPER, "--json").stdout)["access_denied"]
        printed = grid(*PAPER).stdout
    assert set(denied) == {"llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-3b"}
    assert "gated" in denied["llama-3.1-8b"]
    for name in (*denied, "HF_TOKEN"):
        assert name in printed
