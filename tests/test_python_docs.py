"""docs/python.md and docs/example.ipynb are executed as they stand, the notebook in a kernel of its own."""

import os
import re
from dataclasses import replace
from pathlib import Path

import nbclient
import nbformat
import pytest

from orchestrator.spec import models

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, where the notebook and the page keep their storage."""
    return tmp_path_factory.mktemp("python")


@pytest.fixture(scope="module")
def notebook(folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs."""
    loaded = nbformat.read(ROOT / "docs" / "example.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in loaded.cells), "clear its outputs: they name your folders"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        client = nbclient.NotebookClient(loaded, timeout=300, resources={"metadata": {"path": str(folder)}})
        return client.execute()


def said(cell: nbformat.NotebookNode) -> str:
    """All that a cell shows as text."""
    texts = [item.get("text") or item["data"]["text/plain"] for item in cell.outputs]
    return "\n".join(texts)


@pytest.mark.slow
def test_a_notebook_shows_plan_progress_numbers_and_figure(notebook: nbformat.NotebookNode):
    plan, run, table, difference, figure, pairs, path = (
        cell for cell in notebook.cells if cell.cell_type == "code"
    )
    assert "example: 4 trials" in said(plan)
    live = [item for item in run.outputs if item.output_type == "display_data"]
    assert [item["data"]["text/plain"].splitlines()[0] for item in live] == ["4 complete"]
    assert "4 of 4 trials complete" in said(run)
    assert "MLflow database" not in said(run), "what libraries print goes to the log"
    assert "llama-48 tiny_world" in " ".join(said(table).split())
    assert {"difference", "low", "high"} <= set(said(difference).split())
    assert figure.outputs[0]["data"]["image/png"]
    assert "margin" in said(pairs)
    assert path.outputs[0]["data"]["text/plain"] == "'model'"


def test_the_page_runs_from_top_to_bottom(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folder)
    # What its models know is shown to nobody here.
    hasty = {name: replace(model, steps=40) for name, model in models.TINY_MODELS.items()}
    monkeypatch.setattr(models, "TINY_MODELS", hasty)
    scope: dict[str, object] = {}
    blocks = BLOCK.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 5
    for block in blocks:
        exec(block, scope)
    printed = capsys.readouterr().out
    assert "grid has no modles; did you mean models?" in printed
    assert "4 of 4 trials complete" in printed
    assert Path(str(scope["page"])).is_file()
    assert (Path(str(scope["folder"])) / "config.json").is_file()
