"""What is shown of running trials: how far, how fast, how long yet, in a table that fits any terminal."""

import asyncio
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from orchestrator.cli.running import StateWriter
from orchestrator.cli.terminal import Progress, fitting, late_bar, progress_cells
from orchestrator.plan import durations
from orchestrator.plan.durations import Durations
from orchestrator.run.compute import run_shared
from orchestrator.run.events import Completed, Event, Notice, RowsLogged, StageBegan, Started
from orchestrator.spec.resolve import resolve
from orchestrator.spec.stages import TrialPlan
from orchestrator.spec.trials import Sweep
from orchestrator.store.artifacts import Store
from tests.orchestrator.sweep_samples import TINY_WORLD, trial, write_jsonl
from tests.orchestrator.sweep_samples import plan as plan_of
from trainers.errors import DataError
from trainers.specs import DatasetSpec, DrawSpec

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


def begin(notes: StateWriter, *stages: str) -> None:
    for stage in stages:
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


def test_stages_side_by_side_and_sets_one_after_the_other_each_keep_their_pace(
    clock: list[float], store: Store
):
    seen = writer(store)
    begin(seen, "pretrain", "reference")
    for done in (10, 20):
        clock[0] += 1.0
        assert take(seen, "pretrain", done=done, total=100) == ("pretrain", f"{done}/100", "", "10.0")
        shown = take(seen, "reference", done=2 * done, total=200)
        assert shown == ("reference", f"{2 * done}/200", "", "20.0")
    begin(seen, "evaluate")
    for done, total, dataset, rate in (
        # What was done before the first word took nobody knows how long.
        (100, 200, "a", ""),
        (150, 200, "a", "5.0"),
        (1, 50, "b", ""),
        (26, 50, "b", "2.5"),
    ):
        clock[0] += 10.0
        shown = take(seen, "evaluate", done=done, total=total, dataset=dataset)
        assert shown == ("evaluate", f"{done}/{total}", "", rate)


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


def resolved(store: Store, **changes: Any) -> TrialPlan:
    """A trial with its stages."""
    (plan,) = resolve(Sweep(name="demo", trials=(trial(**changes),)), store).plans
    return plan


def test_preparing_pairs_says_how_far_it_is_and_what_a_model_cannot_tell_apart(store: Store, shared: Path):
    data = DatasetSpec(name="same", source=str(shared / "cases" / "identical" / "train.jsonl"))
    plan = resolved(store, train_draw=DrawSpec(max_pairs=60), eval_sets=(data,))
    rows: list[dict[str, Any]] = []
    run_shared(plan.train.prepared, store, rows.append)
    assert rows == [{"done": done, "total": 60} for done in (50, 60)], "60 are drawn, told of 50 by 50"
    info = store.manifest("prepare", plan.train.prepared.key)["info"]
    assert (info["pairs"], info["identical"], info["unknown_tokens"], info["too_long"]) == (60, 0, 0, 0)
    assert info["tokens"] == pytest.approx(info["pairs"] * sum(info["mean_tokens"].values()))
    run_shared(plan.evaluations[0].prepared, store, rows.append)
    identical, unknown = [row["notice"] for row in rows if "notice" in row]
    assert identical.startswith("data: chosen = rejected in tokens, same/test, read by llama-64: 12 of 12")
    assert unknown.startswith("data: unknown tokens, same/test, read by llama-64: ")


def test_a_row_that_cannot_be_rendered_is_said_with_its_set(store: Store, tmp_path: Path):
    prompt = [{"role": role, "content": "bread"} for role in ("user", "assistant", "tool")]
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": prompt, "chosen": "yes", "rejected": "no"}])
    mine = DatasetSpec(name="mine", source=str(tmp_path))
    plan = resolved(store, train_set=mine, eval_sets=(TINY_WORLD,))
    said = r"data set mine, split train, row 0: .*it has no token for the role tool"
    with pytest.raises(DataError, match=said):
        run_shared(plan.train.prepared, store, print)


@pytest.mark.parametrize("width", [30, 200])
def test_a_table_is_whole_at_any_width(width: int):
    table = Table("trial", "state", "evaluations", "cause", title="4 trials")
    table.add_row(NAME, "running", "1/3", "")
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(fitting(table, console))
    assert max(map(len, out.getvalue().splitlines())) <= width
    words = " ".join(out.getvalue().replace("│", " ").split())
    for part in (NAME, "4 trials", "state running, evaluations 1/3" if width < 60 else "running 1/3"):
        assert part in words


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
    assert "/s" in out.getvalue()
