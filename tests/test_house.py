"""The rooms of the house: arrows between packages point one way, and no import runs in a circle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RAY_ROOM = ROOT / "orchestrator" / "run" / "ray" / "__init__.py"
# What each room of orchestrator/ may import besides itself and trainers.
MAY_IMPORT = {
    "store": set(),
    "spec": {"store"},
    "plan": {"spec", "store"},
    "run": {"plan", "spec", "store"},
    "run.ray": {"run", "plan", "spec", "store"},
    "report": {"spec", "store"},
    "tracking": {"report", "spec", "store"},
    "cli": {"store", "spec", "plan", "run", "run.ray", "report", "tracking"},
    # The Python face of the commands: one module.
    "notebook": {"cli", "store", "spec", "plan", "report"},
}


def modules() -> dict[str, Path]:
    """Every module of the product, by its dotted name."""
    found = {}
    for package in ("orchestrator", "trainers", "sweeps"):
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """Yield the product's modules that a module imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        targets = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target in MODULES else str(node.module) for target in targets]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        yield from (target for target in targets if target in MODULES and target != name)


IMPORTS = {name: sorted(set(imported(name))) for name in MODULES}


def room(name: str) -> str:
    """`run.ray` of orchestrator.run.ray.sweep; the package's name outside of orchestrator/."""
    package, *rest = name.split(".")
    if package != "orchestrator":
        return package
    return "run.ray" if rest[:2] == ["run", "ray"] else ".".join(rest[:1])


def test_every_module_of_the_orchestrator_stands_in_a_room():
    flat = [name for name in MODULES if name.startswith("orchestrator.") and room(name) not in MAY_IMPORT]
    assert flat == []


@pytest.mark.parametrize("mine", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(mine: str):
    against = [
        f"{name} imports {target}"
        for name in MODULES
        if room(name) == mine
        for target in IMPORTS[name]
        if room(target) not in {mine, "trainers", "", *MAY_IMPORT[mine]}
    ]
    assert against == []


def test_trainers_and_sweeps_stand_at_the_two_ends():
    against = [
        f"{name} imports {target}"
        for name in MODULES
        for target in IMPORTS[name]
        if (name.startswith("trainers") and not target.startswith("trainers"))
        or (target.startswith("sweeps") and not name.startswith("sweeps"))
    ]
    assert against == []


def test_no_import_runs_in_a_circle():
    """Modules that import nothing that is left are taken away, then those that nothing left imports: circles stay."""
    left = {name: set(targets) for name, targets in IMPORTS.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        left = {name: targets for name, targets in left.items() if name not in free}
    while left and (free := left.keys() - set.union(*left.values())):
        left = {name: targets for name, targets in left.items() if name not in free}
    assert sorted(left) == []


def test_private_interfaces_of_ray_are_imported_in_one_room_and_listed_there():
    listed = set(re.findall(r"\bray(?:\.\w+)+", str(ast.get_docstring(ast.parse(RAY_ROOM.read_text())))))
    private = re.compile(
        r"^\s*from (ray[.\w]*\._\w[.\w]*|ray\.train\.torch\.config|ray\.tune\.execution) import (\w+)", re.M
    )
    used = {
        (name, module, item)
        for name, file in MODULES.items()
        for module, item in private.findall(file.read_text(encoding="utf-8"))
    }
    assert len(used) >= 5
    assert {room(name) for name, _, _ in used} == {"run.ray"}
    assert [use for use in used if not {use[1], f"{use[1]}.{use[2]}"} & listed] == []


def test_no_two_classes_have_one_name():
    """But for the parameters of an experiment's own analysis."""
    classes: dict[str, list[str]] = {}
    for name, file in MODULES.items():
        for found in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.M):
            if (name.split(".")[0], found) != ("sweeps", "Parameters"):
                classes.setdefault(found, []).append(name)
    assert {found: names for found, names in classes.items() if len(names) > 1} == {}
