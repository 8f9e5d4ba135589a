"""What our `ray.init` says inside a submitted job, judged by Ray's own merge of the two."""

import json

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.worker import _merge_runtime_env

from orchestrator.run.ray.cluster import ray_options


@pytest.mark.parametrize(
    "job", [{}, {"working_dir": "gcs://code.zip"}, {"env_vars": {"OMP_NUM_THREADS": "4"}}]
)
def test_a_job_may_set_what_we_set(monkeypatch, job):
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": job, "metadata": {}}))
    merged = _merge_runtime_env(job, ray_options()["runtime_env"])
    assert merged is not None
    assert merged.get("working_dir") == job.get("working_dir")
    assert merged["env_vars"]["OMP_NUM_THREADS"] == job.get("env_vars", {}).get("OMP_NUM_THREADS", "1")
    assert merged["env_vars"]["TOKENIZERS_PARALLELISM"] == "false"
