"""What is shown of running trials: how far, how fast, how long yet, in a table that fits any terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from orchestrator import pace
from orchestrator.layout import fitting
from orchestrator.pace import Pace, duration
from orchestrator.progress import Progress, late_bar

NAME = "llama-3.2-1b · im_rm · ultrafeedback · s0"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the first element."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_of_a_training_is_at_its_own_pace(clock: list[float]):
    seen = Pace()
    seen.begin("train")
    clock[0] += 30.0
    seen.take("train", {"step": 10.0, "total": 40, "loss": 0.25, "pairs": 8, "step_s": 2.0})
    assert seen.cells() == ("train", "10/40", "0.2500", "4.0", "90 s")


def test_each_set_of_an_evaluation_starts_anew(clock: list[float]):
    seen = Pace()
    seen.begin("evaluate")
    clock[0] += 10.0
    seen.take("evaluate", {"done": 100, "total": 200, "dataset": "a"})
    clock[0] += 10.0
    seen.take("evaluate", {"done": 150, "total": 200, "dataset": "a"})
    assert (seen.rate, seen.left_s) == (15.0, pytest.approx(10 / 3))
    seen.take("evaluate", {"done": 1, "total": 50, "dataset": "b"})
    clock[0] += 5.0
    seen.take("evaluate", {"done": 25, "total": 50, "dataset": "b"})
    assert seen.cells() == ("evaluate", "25/50", "", "5.0", "5 s")


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, ""), (42.4, "42 s"), (720, "12 min"), (12_600, "3.5 h")]
)
def test_durations_are_short(seconds: float | None, said: str):
    assert duration(seconds) == said


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_a_table_is_whole_at_any_width(width: int):
    table = Table(title="4 trials")
    for column in ("trial", "state", "evaluations", "cause"):
        table.add_column(column)
    table.add_row(NAME, "running", "1/3", "")
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(fitting(table, console))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(out.getvalue().replace("│", " ").split())
    for part in ("ultrafeedback", "running", "evaluations", "1/3", "4 trials"):
        assert part in words
    if width < 60:
        assert "state running, evaluations 1/3" in words
        assert NAME in words
    else:
        assert "┃" in out.getvalue()


def test_the_live_table_shows_a_reference_and_an_evaluation_with_rate_and_time_left():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, no_color=True)
    with Progress(console, {"k": NAME}, 0) as shown:
        for stage in ("reference", "evaluate"):
            shown.on_event({"trial": "k", "event": "started"})
            shown.on_event({"trial": "k", "event": "stage", "stage": stage})
            shown.on_event(
                {"trial": "k", "event": "rows", "stage": stage, "rows": [{"done": 5, "total": 20}]}
            )
            shown._live.refresh()
            assert f"{stage}" in out.getvalue()
    assert "5/20" in out.getvalue()


def test_a_bar_says_its_rate():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, no_color=True)
    with late_bar(console, "bootstrap", 0.0) as step:
        for done in range(3):
            step(done, 10)
    assert "/s" in out.getvalue()
