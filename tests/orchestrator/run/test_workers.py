"""What a process does between two trials."""

import gc
import weakref

import pytest

from orchestrator.run.workers import make_room


class Engine:
    """Refers to itself, as a model and its engine refer to each other."""

    def __init__(self) -> None:
        self.model = self


@pytest.fixture
def thawed():
    yield
    gc.unfreeze()


def test_what_any_trial_held_is_given_back_and_what_stays_is_not_looked_through_again(thawed):
    stays = [[] for _ in range(1000)]
    for _ in range(3):
        held = Engine()
        gone = weakref.ref(held)
        del held
        make_room()
        assert gone() is None
    looked_at = {id(item) for item in gc.get_objects()}
    assert not any(id(item) in looked_at for item in stays)
