"""Four real gangs of two on nodes that hold two of them at once: the gate lets all of them through, none spread."""

import pytest

from orchestrator.run.events import Completed, Retried, RowsLogged
from tests.faults.cells import EX_RM, GANG, IM_RM, Run, cells
from tests.faults.ray_world import running_world

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Tune leaves files open that its own process would close at its end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_four_real_gangs_pass_the_gate(tiny_model, tmp_path):
    plans = cells(tmp_path, tiny_model, (EX_RM, IM_RM), epochs=2, seeds=(0, 1))
    with running_world():
        run = Run(tmp_path, plans, GANG)
    assert len(run.of(Completed)) == 4, run.events
    assert not run.of(Retried)
    told = {(event.trial, event.stage) for event in run.of(RowsLogged)}
    stages = ("prepare", "reference", "train", "evaluate")
    assert {stage for _, stage in told} == {*stages}, "every long step says how far it is"
    assert {(plan.key, "evaluate") for plan in plans} <= told
    infos = [run.store.manifest("train", plan.key)["info"] for plan in plans]
    assert [info["placement"]["world_size"] for info in infos] == [2] * 4
    assert not list((tmp_path / "checkpoints").glob("*"))
