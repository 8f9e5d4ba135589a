"""A sweep whose storage is a bucket: complete, killed, damaged, resumed, and read by somebody else."""

import json
import os
import shutil
from functools import partial

import pytest

from orchestrator.artifacts import MANIFEST, Store
from tests.faults.hooks import all_of, at_step, before_each
from tests.faults.lives import artifacts, lived
from tests.object_store import SECRET


def in_environment(bucket, *more):
    """What a life does first to reach the bucket."""
    return partial(all_of, partial(enter, bucket.environment), *more)


def enter(environment):
    os.environ.update(environment)


def dies():
    os.kill(os.getpid(), 9)


@pytest.fixture
def live(bucket, tmp_path):
    """Run a command on the bucket to its end; what it printed."""

    def run(words, *hooks, exits=0):
        before = in_environment(bucket, *hooks)
        return lived(tmp_path / "life", (*words, "--storage", bucket.uri), before, exits=exits)

    return run


def contents(bucket, tmp_path):
    """Every committed artifact, read as somebody who has nothing of it yet would."""
    os.environ["RMSWEEP_CACHE"] = str(tmp_path / "another machine")
    store = Store(bucket.root)
    found = artifacts(store.root)
    os.environ["RMSWEEP_CACHE"] = bucket.environment["RMSWEEP_CACHE"]
    shutil.rmtree(tmp_path / "another machine")
    return found


def test_a_sweep_runs_to_its_end_and_again_to_nothing(live, one, bucket, tmp_path):
    print(live(one))
    found = contents(bucket, tmp_path)
    print(sorted(map(str, bucket.root.sizes())))
