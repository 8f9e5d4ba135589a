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


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_own_allocator_wins_by_either_of_its_names(monkeypatch, name):
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(known, raising=False)

    def allocator():
        merged = _merge_runtime_env({}, ray_options()["runtime_env"])
        return {key: value for key, value in merged["env_vars"].items() if "ALLOC" in key}

    assert allocator() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    assert allocator() == {name: "backend:cudaMallocAsync"}
