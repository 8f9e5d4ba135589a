"""state.json: what a driver noted, read back whole or, where it is damaged, not at all."""

from types import SimpleNamespace

import pytest

from orchestrator.cli.running import StateWriter
from orchestrator.run.events import (
    Completed,
    Event,
    Failed,
    Notice,
    Replanned,
    Retried,
    RowsLogged,
    StageBegan,
    Started,
    Stopped,
)
from orchestrator.store.artifacts import Store
from orchestrator.store.records import SweepState, TrialNote, read_state


def told(store: Store, *events: Event, todo: tuple[str, ...] = ("a",)) -> dict[str, TrialNote]:
    writer = StateWriter("s", store, "driver-1", ["full_grid.py", "--json"], todo)
    for event in events:
        writer.on_event(event)
    writer.close()
    return dict(read_state("s", store).trials)


def test_a_failed_trial_is_read_back_as_noted(store: Store):
    rows = [{"step": 1.0, "total": 4}, {"step": 2.0, "total": 4}]
    notes = told(
        store,
        Started(trial="a"),
        StageBegan(trial="a", stage="train"),
        RowsLogged(trial="a", stage="train", rows=rows),
        Replanned(trial="a", text="planned for 8 GPUs; on 4"),
        Retried(trial="a", cause="WorkerLost", message="gone", how="again in 5 s"),
        Failed(trial="a", cause="Diverged", message="step 3"),
    )
    expected = TrialNote(
        state="failed",
        stage="train",
        step=2,
        total=4,
        cause="Diverged",
        message="step 3",
        retries=["WorkerLost: gone"],
        replanned=["planned for 8 GPUs; on 4"],
    )
    assert notes == {"a": expected}
    read = read_state("s", store)
    assert (read.driver, read.command) == ("driver-1", ("full_grid.py", "--json"))


def test_the_hours_of_attempts_that_made_nothing_are_noted_and_outlive_a_killed_driver(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    now_h = 0.0
    clock = SimpleNamespace(monotonic=lambda: 3600 * now_h)
    monkeypatch.setattr("orchestrator.cli.running.time", clock)

    def lost_h(*events: tuple[float, Event]) -> dict[str, float]:
        nonlocal now_h
        writer = StateWriter("s", store, "driver-1", [], ["a"])
        for hour, event in events:
            now_h = hour
            writer.on_event(event)
        # Killed: never closed.
        return dict(read_state("s", store).trials["a"].lost_h)

    train = StageBegan(trial="a", stage="train", key="k", devices=2)
    gone = Retried(trial="a", cause="WorkerLost", message="gone", how="again in 5 s")
    row = RowsLogged(trial="a", stage="train", rows=[{"step": 1, "total": 4}])
    # The second rank begins, too; nothing counts while the trial waits to try again.
    assert lost_h((1, train), (2, train), (4, gone), (7, train), (8, row)) == {"train/k": 2 * 3 + 2 * 1}
    waiting = StageBegan(trial="a", stage="waiting")
    score = StageBegan(trial="a", stage="evaluate", key="e")
    scored = (9, train), (10, row), (11, waiting), (12, score), (13, waiting), (14, Completed(trial="a"))
    assert lost_h(*scored) == {"train/k": 8}


def test_what_still_ran_or_waited_at_the_end_is_stopped(store: Store):
    notes = told(store, Started(trial="a"), Completed(trial="b"), todo=("a", "b", "c"))
    assert {key: note.state for key, note in notes.items()} == {
        "a": "stopped",
        "b": "complete",
        "c": "stopped",
    }


def test_why_a_trial_failed_is_known_until_it_is_complete(store: Store):
    failure = {"cause": "Diverged", "message": "m"}
    told(store, Failed(trial="a", **failure))
    killed = StateWriter("s", store, "killed", [], ["a"])
    note = read_state("s", store).trials["a"]
    assert (note.state, note.cause) == ("waiting", "Diverged")
    # A failure is written at once.
    killed.on_event(Failed(trial="a", **failure))
    assert read_state("s", store).trials["a"].state == "failed"
    assert told(store, Started(trial="a"), Stopped(trial="a"))["a"].cause == "Diverged"
    assert told(store, Completed(trial="a"))["a"] == TrialNote(state="complete")


def test_what_earlier_commands_noted_stays(store: Store):
    told(store, Failed(trial="a", cause="Diverged", message="m"), todo=("a", "b"))
    assert told(store, Completed(trial="b"), todo=("b",))["a"].state == "failed"


def test_events_of_other_trials_and_rows_without_a_total_change_nothing(store: Store):
    notes = told(
        store,
        Started(trial="unknown"),
        RowsLogged(trial="a", stage="evaluate", rows=[{"done": 3}]),
        Notice(trial="a", text="t"),
    )
    assert notes == {"a": TrialNote(state="stopped")}


GOOD = b'{"driver": "d", "command": [], "trials": {"a": {"state": "failed"}}}'
DAMAGED = [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe\x00", b"\x00\x01", GOOD[:-5]]
DAMAGED += [b'{"driver": "d", "command": [], "trials": []}', GOOD.replace(b"state", b"status")]


@pytest.mark.parametrize("content", [*DAMAGED, GOOD.replace(b"[]", b"null")])
def test_a_damaged_note_is_none(store: Store, content: bytes):
    file = store.sweep_dir("s") / "state.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert read_state("s", store) == SweepState()
    # And the next command writes a new one.
    assert told(store, Completed(trial="a"))["a"].state == "complete"


def test_a_note_that_cannot_be_written_ends_nothing(store: Store):
    store.sweep_dir("s").parent.mkdir(parents=True)
    store.sweep_dir("s").write_text("a file where the folder should be")
    assert told(store, Started(trial="a")) == {}


def test_a_running_trial_s_pace_is_noted_and_a_failed_one_has_none(store: Store):
    row = {"step": 1.0, "total": 4, "loss": 0.5, "pairs": 8, "step_s": 2.0}
    writer = StateWriter("s", store, "driver-1", [], ["a", "b"])
    for trial in ("a", "b"):
        writer.on_event(Started(trial=trial))
        writer.on_event(StageBegan(trial=trial, stage="train"))
        writer.on_event(RowsLogged(trial=trial, stage="train", rows=[row]))
    writer.on_event(Failed(trial="b", cause="Diverged", message="m"))
    writer.close()
    notes = read_state("s", store).trials
    assert (notes["a"].loss, notes["a"].pairs_per_s) == (0.5, 4.0)
    assert (notes["b"].loss, notes["b"].pairs_per_s) == (0.5, None)
