"""What the tests of faults share."""

from pathlib import Path

import pytest

from orchestrator.artifacts import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")
