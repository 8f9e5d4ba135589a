"""Arrows point one way, and planning pays for no heavy import."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "ray",
    "mlflow",
    "transformers",
    "deepspeed",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "scipy",
    "pandas",
)
# The command lines come first, which load no Arrow either.
PLANNING = (
    "sweeps.full_grid",
    "orchestrator.cli.run",
    "orchestrator.spec.resolve",
    "orchestrator.plan.outlook",
    "orchestrator.plan.hardware",
    "orchestrator.report.summary",
    "orchestrator.run.inline",
    "orchestrator.tracking.mlflow",
    "orchestrator.report.page",
    "orchestrator.report.two_sweeps",
)
IMPORT_EVERY_TRAINER = """
import importlib, pkgutil, sys
for name in ("ray", "mlflow", "orchestrator", "sweeps"):
    sys.modules[name] = None
import trainers
names = [item.name for item in pkgutil.walk_packages(trainers.__path__, "trainers.")]
names = [name for name in names if not name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
IMPORT_FOR_PLANNING = """
import importlib, sys
for number, module in enumerate({modules!r}):
    importlib.import_module(module)
    heavy = {heavy!r} + (() if number else ("pyarrow",))
    print(*[f"{{module}} imports {{name}}" for name in heavy if name in sys.modules], sep="\\n", end="")
"""
RESOLVE = """
import sys
from pathlib import Path
from orchestrator.spec import catalog
from orchestrator.cli import session
from orchestrator.store.artifacts import Store
from orchestrator.spec.declaration import declare
from orchestrator.cli.options import Options
from orchestrator.plan.placement import place
from orchestrator.plan.hardware import local_capacity
from orchestrator.spec.resolve import missing_trials, resolve
from sweeps.full_grid import full_grid

store = Store(Path({store!r}))
sweep = full_grid(session.select(Options(), catalog.LAPTOP, "demo"))
resolved = resolve(sweep, store)
for trial in sweep.trials:
    place(trial, local_capacity(), sweep.placements)
assert len(missing_trials(resolved.plans, store)) == len(sweep.trials)
declare(resolved)
print(*[name for name in {heavy!r} if name in sys.modules])
"""

NOTHING_TO_CATCH_UP_WITH = """
import sys
from pathlib import Path
from rich.console import Console
from orchestrator.store.artifacts import Store
from orchestrator.cli.session import Session
from orchestrator.cli.options import Options
from orchestrator.store.records import Declaration
from orchestrator.report.summary import Written
from orchestrator.cli.running import catch_up
from orchestrator.tracking.mlflow import SHOWN, view_mark

store = Store(Path({store!r}))
session = Session(
    options=Options(), sweep_name="demo", store=store, tracking_uri="http://host", folder=Path(), console=Console()
)
declared = Declaration(sweep="demo", trials=())
note = store.sweep_dir("demo") / SHOWN
note.parent.mkdir(parents=True, exist_ok=True)
written = Written(folder=note.parent, results=[])
note.write_text(view_mark("http://host", store, "demo"))
catch_up(session, declared, written)
print(*[name for name in {heavy!r} if name in sys.modules])
"""


def python(program: str) -> str:
    """What a fresh interpreter prints that runs `program` from the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_trainers_module_imports_without_ray_mlflow_and_the_orchestrator():
    assert int(python(IMPORT_EVERY_TRAINER)) >= 15


def test_what_plans_and_reports_imports_nothing_heavy():
    assert python(IMPORT_FOR_PLANNING.format(modules=PLANNING, heavy=HEAVY)) == ""


def test_planning_the_laptop_grid_imports_nothing_heavy(tmp_path: Path):
    assert python(RESOLVE.format(store=str(tmp_path / "store"), heavy=HEAVY)) == ""


def test_a_complete_sweep_whose_view_lacks_nothing_imports_nothing_heavy(tmp_path: Path):
    assert python(NOTHING_TO_CATCH_UP_WITH.format(store=str(tmp_path / "store"), heavy=HEAVY)) == ""
