"""One small sweep that the fault tests share: four cells from a tiny random model, and what it comes to undisturbed."""

import shutil

import pytest

from tests.conftest import made_once
from tests.faults.lives import lived
from tests.faults.ray_world import running_world

SIZE = ("--max-train-pairs", "24", "--max-eval-pairs", "8", "--epochs", "2", "--effective-batch", "4")
SETS = ("--train-sets", "tiny_world", "--eval-sets", "tiny_world", "hamiltonian", "--lr", "1e-3")
STEPS = 12


@pytest.fixture(scope="session")
def grid(empty_database, tmp_path_factory):
    """Words of a command without models and cells."""
    database = shutil.copy(empty_database, tmp_path_factory.mktemp("mlflow"))
    tracking = ("--tracking-uri", f"sqlite:///{database}")
    return ("--backend", "inline", "--profile", "laptop", *SIZE, *SETS, *tracking, "--checkpoint-steps", "3")


@pytest.fixture(scope="session")
def one(grid, tiny_model):
    """The command of the first cell alone."""
    return (*grid, "--models", str(tiny_model), "--rewards", "ex_rm", "--seeds", "0")


@pytest.fixture(scope="session")
def four(grid, tiny_model):
    """The command of all four cells."""
    return (*grid, "--models", str(tiny_model), "--rewards", "ex_rm", "im_rm", "--seeds", "0", "1")


@pytest.fixture(scope="session")
def whole(four, tmp_path_factory):
    """The storage of the four cells, computed undisturbed."""
    return made_once(tmp_path_factory, "whole", lambda storage: lived(storage, four))


@pytest.fixture
def storage(whole, tmp_path):
    """A copy of the complete storage."""
    return shutil.copytree(whole, tmp_path / "store")


@pytest.fixture(scope="module")
def ray_world():
    """A Ray of three nodes that a test may harm."""
    with running_world() as world:
        yield world
