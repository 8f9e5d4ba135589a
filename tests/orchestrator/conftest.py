"""What several test files share."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from orchestrator.store.artifacts import Store

# Wall time on a busy machine says nothing about these functions.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")
