"""A cell that cannot work is a named hole; its neighbours complete. Any number of CPUs from two on is enough."""

import json

from tests.ray.test_full_grid import grid, said


def test_a_failed_cell_takes_no_other_down(tmp_path):
    turn = {"prompt": "why", "chosen": "yes", "rejected": "no"}
    (tmp_path / "train.jsonl").write_text(json.dumps(turn))
    # Longer than any limit: this set prepares to nothing, which only its stage can find out.
    (tmp_path / "long.jsonl").write_text(json.dumps({**turn, "prompt": "yes " * 3000}))
    (tmp_path / "test.jsonl").write_text(json.dumps({**turn, "prompt": "no"}))
    sets = ("--train-sets", str(tmp_path / "train.jsonl"), str(tmp_path / "long.jsonl"), "--eval-sets")
    flags = (
        "--models",
        "llama-64",
        "--rewards",
        "ex_rm",
        *sets,
        str(tmp_path / "test.jsonl"),
        "--epochs",
        "1",
    )
    done = grid(tmp_path, "run", *flags)
    assert done.returncode == 3, said(done)
    assert "1/2 complete" in said(done) or "complete: llama-64 · ex_rm · train · s0" in said(done)
    assert "missing: llama-64 · ex_rm · long · s0: all 1 pairs are over the limit" in said(done)
    assert "Traceback" not in said(done)
    status = json.loads(grid(tmp_path, "status", "--json").stdout)
    assert [row["state"] for row in status] == ["complete", "missing"]
