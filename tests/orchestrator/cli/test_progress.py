"""What is shown of running trials: how far, how fast, how long yet, in a table that fits any terminal."""

import asyncio
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from orchestrator.cli.running import StateWriter
from orchestrator.cli.terminal import Progress, duration, fitting, late_bar, progress_cells
from orchestrator.plan import durations
from orchestrator.plan.durations import Durations
from orchestrator.run.compute import run_shared
from orchestrator.run.events import Completed, Event, Notice, RowsLogged, StageBegan, Started
from orchestrator.spec.resolve import resolve
from orchestrator.spec.trials import Sweep, grid
from orchestrator.store.artifacts import Store
from tests.orchestrator.sweep_samples import EX_RM, LLAMA, TINY_WORLD, trial
from tests.orchestrator.sweep_samples import plan as plan_of
from trainers.errors import DataError
from trainers.specs import DatasetSpec, DrawSpec, OptimSpec

NAME = "llama-3.2-1b · im_rm · ultrafeedback · s0"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the first element."""
    now = [100.0]
    monkeypatch.setattr(durations.time, "monotonic", lambda: now[0])
    return now


def writer(store: Store) -> StateWriter:
    """Notes of one trial, `k`."""
    return StateWriter("demo", store, "", [], ["k"])


def begin(notes: StateWriter, stage: str) -> None:
    notes.on_event(StageBegan(trial="k", stage=stage))


def take(notes: StateWriter, stage: str, **row: Any) -> tuple[str, ...]:
    """What is shown once the row is logged."""
    notes.on_event(RowsLogged(trial="k", stage=stage, rows=[row]))
    return progress_cells(notes.notes["k"])


def test_a_training_says_its_pace_after_enough_steps(clock: list[float], store: Store):
    seen = writer(store)
    begin(seen, "train")
    for step, train_s in ((9, None), (10, 120.0)):
        clock[0] += 3.0 * (step if step == 9 else 1)
        shown = take(seen, "train", step=float(step), total=40, loss=0.25, pairs=8, step_s=2.0)
        assert shown == ("train", f"{step}/40", "0.2500", "4.0")
        assert seen.notes["k"].train_s == train_s
    begin(seen, "evaluate")
    take(seen, "evaluate", done=1, total=2, dataset="a")
    assert seen.notes["k"].train_s == 120.0, "what is trained tells how long the others will take"


def test_each_set_of_an_evaluation_starts_anew(clock: list[float], store: Store):
    seen = writer(store)
    begin(seen, "evaluate")
    clock[0] += 10.0
    take(seen, "evaluate", done=100, total=200, dataset="a")
    clock[0] += 10.0
    # What was done before the first word took nobody knows how long.
    shown = take(seen, "evaluate", done=150, total=200, dataset="a")
    assert shown == ("evaluate", "150/200", "", "5.0")
    assert take(seen, "evaluate", done=1, total=50, dataset="b") == ("evaluate", "1/50", "", "")
    clock[0] += 5.0
    assert take(seen, "evaluate", done=26, total=50, dataset="b") == ("evaluate", "26/50", "", "5.0")


def test_stages_side_by_side_each_keep_their_pace(clock: list[float], store: Store):
    seen = writer(store)
    for stage in ("pretrain", "reference"):
        begin(seen, stage)
    for done in (10, 20, 30):
        clock[0] += 1.0
        shown = take(seen, "pretrain", done=done, total=100)
        assert shown == ("pretrain", f"{done}/100", "", "10.0")
        shown = take(seen, "reference", done=2 * done, total=200)
        assert shown == ("reference", f"{2 * done}/200", "", "20.0")


def test_everybody_who_waits_for_a_shared_stage_hears_how_far_it_is(store: Store):
    """On Ray it is computed once, in a task that knows no trial. What is to be read is said once."""
    from orchestrator.run.ray.coordinator import Coordinator

    stage, row = plan_of(trial()).train.prepared, RowsLogged(stage="prepare", rows=[{"done": 1}])
    notice = Notice(text="data: unknown tokens")

    async def scene() -> list[Event]:
        coordinator = Coordinator(None, (), {}, Durations(store=store))
        done = asyncio.Event()
        coordinator._run_shared = lambda _: done.wait()
        waiting = [asyncio.create_task(coordinator.shared(stage, name)) for name in ("a", "b")]
        await asyncio.sleep(0)
        await coordinator.post_shared(stage.key, row)
        await coordinator.post_shared(stage.key, notice)
        done.set()
        await asyncio.gather(*waiting)
        await coordinator.post_shared(stage.key, row)
        return await coordinator.drain()

    told = [("a", row), ("b", row), ("a", notice)]
    assert asyncio.run(scene()) == [dataclasses.replace(event, trial=trial) for trial, event in told]


def test_preparing_pairs_says_how_far_it_is(store: Store):
    """As on both backends: 60 pairs are drawn, told of in rows of 50."""
    drawn = grid(
        models=[LLAMA],
        rewards=[EX_RM],
        train_sets=[TINY_WORLD],
        eval_sets=[TINY_WORLD],
        seeds=[0],
        recipe=lambda *_: OptimSpec(),
        train_draw=DrawSpec(max_pairs=60),
        eval_draw=DrawSpec(),
    )
    (plan,) = resolve(Sweep(name="demo", trials=drawn), store).plans
    rows: list[dict[str, Any]] = []
    run_shared(plan.train.prepared, store, rows.append)
    assert rows == [{"done": done, "total": 60} for done in (50, 60)]
    rows.clear()
    run_shared(plan.evaluations[0].prepared, store, rows.append)
    info = store.manifest("prepare", plan.evaluations[0].prepared.key)["info"]
    assert rows[-1]["done"] == rows[-1]["total"] == info["pairs"]
    assert (info["identical"], info["unknown_tokens"], info["too_long"]) == (0, 0, 0)
    assert info["tokens"] == pytest.approx(info["pairs"] * sum(info["mean_tokens"].values()))


def test_preparing_pairs_says_what_a_model_cannot_tell_apart(store: Store, shared: Path):
    data = DatasetSpec(name="same", source=str(shared / "cases" / "identical" / "train.jsonl"))
    drawn = dataclasses.replace(trial(), train_set=TINY_WORLD, eval_sets=(data,))
    (plan,) = resolve(Sweep(name="demo", trials=(drawn,)), store).plans
    rows: list[dict[str, Any]] = []
    run_shared(plan.evaluations[0].prepared, store, rows.append)
    said = [row["notice"] for row in rows if "notice" in row]
    assert [text.partition(", read by llama-64: ")[0] for text in said] == [
        "data: chosen = rejected in tokens, same/test",
        "data: unknown tokens, same/test",
    ]
    assert "12 of 12 pairs" in said[0]


def test_a_row_that_cannot_be_rendered_is_said_with_its_set(store: Store, tmp_path: Path):
    prompt = [{"role": role, "content": "bread"} for role in ("user", "assistant", "tool")]
    row = {"prompt": prompt, "chosen": "yes", "rejected": "no"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    drawn = grid(
        models=[LLAMA],
        rewards=[EX_RM],
        train_sets=[DatasetSpec(name="mine", source=str(tmp_path))],
        eval_sets=[TINY_WORLD],
        seeds=[0],
        recipe=lambda *_: OptimSpec(),
        train_draw=DrawSpec(),
        eval_draw=DrawSpec(),
    )
    (plan,) = resolve(Sweep(name="demo", trials=drawn), store).plans
    with pytest.raises(
        DataError, match=r"data set mine, split train, row 0: .*it has no token for the role tool"
    ):
        run_shared(plan.train.prepared, store, print)


@pytest.mark.parametrize(("seconds", "said"), [(42.4, "42 s"), (720, "12 min"), (12_600, "3.5 h")])
def test_durations_are_short(seconds: float, said: str):
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


def test_the_live_table_shows_a_reference_and_an_evaluation_with_its_rate(store: Store):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, no_color=True)
    state = writer(store)
    with Progress(console, {"k": NAME}, state.notes, 0) as shown:
        for stage in ("reference", "evaluate"):
            state.on_event(Started(trial="k"))
            begin(state, stage)
            take(state, stage, done=5, total=20)
            shown._live.refresh()
            assert f"{stage}" in out.getvalue()
    assert "5/20" in out.getvalue()


def drawn(progress: Progress, console: Console) -> list[str]:
    """The lines of the live table as it is now."""
    with console.capture() as said:
        console.print(progress._table())
    return [line.rstrip() for line in said.get().splitlines()]


def test_the_live_table_keeps_its_height_and_columns_and_its_counts_agree_with_its_rows(store: Store):
    names = {f"k{n}": f"llama-3.2-{n}b · ex_rm · ultrafeedback · s0" for n in range(14)}
    state = StateWriter("demo", store, "", [], list(names))
    console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    shown = Progress(console, names, state.notes, 2, "starting Ray")
    assert drawn(shown, console) == ["14 waiting, 2 complete", "⠋ starting Ray"]
    for key in list(names)[:3]:
        state.on_event(Started(trial=key))
    assert drawn(shown, console)[0] == "14 waiting, 2 complete", "what waits for devices does not run"
    for key in list(names):
        state.on_event(Started(trial=key))
        state.on_event(StageBegan(trial=key, stage="train"))
    full = drawn(shown, console)
    assert full[0] == "14 running, 2 complete"
    assert sum("train" in line for line in full) == 12
    assert full[-1] == "and 2 more"
    assert full[2].split() == ["llama-3.2-0b", "train"], "what all have in common is not repeated"
    for key in list(names)[1:]:
        state.on_event(Completed(trial=key))
    row = {"step": 12345, "total": 99999, "loss": 0.6875, "pairs": 8, "step_s": 2.0}
    state.on_event(RowsLogged(trial="k0", stage="train", rows=[row]))
    few = drawn(shown, console)
    assert few[0].startswith("1 running, 15 complete, about ")
    assert len(few) == len(full)
    assert few[2].index("train") == full[2].index("train")


def test_piped_progress_is_lines_under_a_header(store: Store):
    out = io.StringIO()
    names = {"k": NAME, "l": NAME.replace("im_rm", "ex_rm")}
    state = StateWriter("demo", store, "", [], list(names))
    with Progress(Console(file=out, width=120), names, state.notes, 0, "starting Ray") as shown:
        for key in names:
            row = {"step": 1, "total": 4, "loss": 0.5, "pairs": 8, "step_s": 2.0}
            for event in (
                Started(trial=key),
                StageBegan(trial=key, stage="train"),
                RowsLogged(trial=key, stage="train", rows=[row]),
                Completed(trial=key),
            ):
                state.on_event(event)
                shown.on_event(event)
    assert out.getvalue().splitlines() == [
        "starting Ray …",
        "trial  stage           step    loss  pairs/s",
        "im_rm  train            1/4  0.5000      4.0",
        f"1/2 complete: {NAME}",
        f"2/2 complete: {names['l']}",
    ]


def test_a_bar_counts_what_is_done():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, no_color=True)
    with late_bar(console, "bootstrap", 0.0) as step:
        for done in range(3):
            step(done, 10)
    assert "2/10" in out.getvalue()
