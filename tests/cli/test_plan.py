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
    # In a narrow terminal each column has its name before its value.
    said = " ".join(done.stdout.split()).replace("bf16, devices", "bf16")
    for part in (
        "72 trials on 2 × 8 × H100-80GB",
        "8.03 B",
        "train 72 to do, 0 cached",
        "GPU-hours on 16 GPUs",
        "never under",
        "per GPU-hour (assumed: AWS on demand",
        "of the peak rate (MFU); their time: backbone",
        "not fetched: gemma-2-2b, llama-3.1-8b",
        "8.03 B bf16 4, ZeRO",
        "trained on ultrafeedback, evaluated on ultrafeedback (in-distribution), ultrafeedback_paraphrase, "
        "ultrafeedback_french, ultrafeedback_spanish (token-level shift), rewardbench_math, rewardbench_code, rewardmath "
        "(domain shift)",
    ):
        assert part in said
    # Nothing is started, and nothing is written.
    assert list(tmp_path.iterdir()) == []


def test_json_says_the_same_in_numbers(grid):
    done = grid(*PAPER, "--json", "--price", "2")
    found = json.loads(done.stdout)
    assert (found["devices"], found["unit"], len(found["trials"]), len(found["cells"])) == (16, "GPU", 72, 12)
    assert found["categories"]["rewardmath"]["in-distribution"] == ["rewardmath"]
    for cell in found["cells"]:
        assert cell["train_sets"] == ["ultrafeedback", "rewardmath"]
        assert cell["precision"] == ("bf16" if cell["model"] == "llama-3.1-8b" else "fp32")
        at = cell["placement"]
        assert at["forward_tokens"] >= 3072
        assert cell["effective_batch"] == 32
        assert 0 < cell["peak_gb"] <= cell["gpu_gb"] == 80
        assert cell["step_s"] > 0
        assert sum(cell["step_shares"].values()) == pytest.approx(1)
        assert 0.1 < cell["utilisation"] < 0.7
        assert not cell["measured"]
        assert not cell["why"]
    eight = [cell for cell in found["cells"] if cell["model"] == "llama-3.1-8b"]
    assert [cell["placement"]["world_size"] for cell in eight] == [4, 4]
    # Six models, two training sets, seven evaluation sets; the shared stages once.
    assert found["stages"]["train"] == {"cached": 0, "missing": 72}
    assert found["stages"]["reference"]["missing"] < 72
    assert found["lower_bound_h"] <= found["makespan_h"]
    assert found["price"] == pytest.approx(2 * found["device_hours"])
    assert found["price_held"] == pytest.approx(2 * 16 * found["makespan_h"])
    assert "llama-3.2-1b" in found["not_fetched"]


@pytest.mark.parametrize("width", [80, 160])
def test_each_row_names_its_training_set_and_its_hours_of_what(grid, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    words = ("plan", "--profile", "laptop", "--backend", "inline", "--models", "gemma2-64", "llama-48")
    # Of the profile's sets one is trained on two processes.
    words += ("--train-sets", "tiny_world", "hamiltonian")
    printed = grid(*words).stdout
    said = " ".join(printed.split())
    table = printed.partition("all alike: precision fp32; batch 32\n")[0]
    assert max(map(len, table.splitlines())) <= width
    for train_set, devices in (("tiny_world", "2, ZeRO 3"), ("hamiltonian", "1, ZeRO 0")):
        model = "gemma2-64 ·" if width == 80 else "gemma2-64 · ex_rm"
        assert f"{model} {train_set} 1 93.4 k {devices}" in said
    # What is left out of a narrow table is the least of it.
    assert ("tokens a forward" in table) == (width > 80)
    assert "evaluate" in table
    assert "CPU-hours on" in said


def test_the_papers_grid_is_a_table_of_a_line_a_row_on_a_terminal_of_80_columns(grid, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = grid(*PAPER).stdout
    table = printed.partition(
        "all alike: trained on ultrafeedback, rewardmath; trials 6; batch 32; GPU GB 80; to do"
    )[0]
    rows = [line for line in table.splitlines() if "_rm" in line]
    assert len(rows) == 12
    assert all(len(line) <= 80 and len(line.split()) == 14 for line in rows)
    assert max(map(len, table.splitlines())) <= 80


def test_what_does_not_fit_is_said_with_what_would(grid):
    done = grid("plan", "--profile", "paper", "--cluster", "1x1xL4-24GB@0.5")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert "does not fit: llama-3.1-8b · im_rm needs" in said
    assert "It would fit on 2 GPUs of 24 GB" in said
    assert "(--cluster)" in said


def test_the_laptop_is_planned_on_this_machines_cpus(grid):
    # Inline, so that a Ray that happens to run here is not asked.
    done = grid("plan", "--profile", "laptop", "--backend", "inline", "--json")
    found = json.loads(done.stdout)
    assert (found["unit"], found["price"]) == ("CPU", None)
    assert all(cell["peak_gb"] < 1 for cell in found["cells"])
    assert {cell["placement"]["world_size"] for cell in found["cells"]} == {1, 2}
    assert found["stages"]["pretrain"] == {"cached": 0, "missing": 6}


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("plan", "--cluster", "2x8xQ100"), ["--cluster 2x8xQ100", "'Q100'", "2x8xH100-80GB"]),
        (("plan", "--cluster", "nonsense"), ["'nonsense'", "is not NODESxGPUSxKIND"]),
        (("plan", "--cluster", "nowhere.yaml"), ["nowhere.yaml", "cannot be read"]),
        (("plan", "--cluster", "1x1xH100", "--price", "-1"), ["--price -1"]),
        (("plan", "--backend", "inline", "--price", "2"), ["--price 2: there is no GPU here"]),
        (("plan", "--backend", "inline", "--cluster", ""), ["'' is not NODESxGPUSxKIND"]),
        (("--cluster", "1x1xH100", "--backend", "inline"), ["there is no Ray cluster to run on"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_words_are_refused(grid, tmp_path, arguments, messages):
    done = grid(*arguments, "--profile", "laptop")
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    assert "Traceback" not in said
    for message in messages:
        assert message in said
    assert list(tmp_path.iterdir()) == []


class _Hub(Quiet):
    """A hub where every llama is gated, one Qwen is not there, and the rest is free."""

    def do_GET(self) -> None:
        if "meta-llama" in self.path:
            self._answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        elif "Qwen2.5-3B" in self.path:
            self._answer(404, {"X-Error-Code": "RepoNotFound"})
        else:
            self._answer(200, {})

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


def test_models_that_the_hub_denies_are_named_in_one_message(grid, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with closing(Loopback(_Hub)) as hub:
        ask_at(hub.url, monkeypatch)
        done, printed = grid(*PAPER, "--json"), grid(*PAPER)
    denied = json.loads(done.stdout)["access_denied"]
    assert set(denied) == {"llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-3b"}
    assert "gated" in denied["llama-3.1-8b"]
    for name in denied:
        assert f"{name}: " in printed.stdout
    assert "HF_TOKEN" in printed.stdout
