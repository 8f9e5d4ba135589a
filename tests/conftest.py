"""What tests share: the real data beside the repository, the real chat model, and a tiny random one."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.object_store import Bucket, new_bucket, running_server

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parent.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption(
        "--run-alone", action="store_true", help="run the tests that end every Ray process, only"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def runs(item: pytest.Item) -> bool:
        if config.getoption("--run-alone"):
            return "alone" in item.keywords
        return "alone" not in item.keywords and (
            config.getoption("--run-slow") or "slow" not in item.keywords
        )

    for item in items:
        # Collecting all tests takes 20 s, so `make test` looks for these in two folders only.
        apart = {TESTS / "ray", TESTS / "faults"} & {*item.path.parents}
        assert apart or not item.get_closest_marker("ray"), (
            f"{item.nodeid} belongs into tests/ray or tests/faults"
        )
    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


def missing(what: str) -> None:
    """Skip for a missing part, which in CI is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have {what}")
    pytest.skip(f"{what} is not here")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real preference data that stands beside the repository."""
    if not (SHARED / "data").is_dir():
        missing("../shared/data")
    return SHARED


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, made by the first process of this test run that wants it, and only read by all."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


def found_once(
    factory: pytest.TempPathFactory, name: str, find: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Such a folder, and what `find` returned when it filled it, as JSON has it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "found_once.json").write_text(json.dumps(find(folder)))

    folder = made_once(factory, name, make)
    return folder, json.loads((folder / "found_once.json").read_text())


@pytest.fixture(scope="session")
def smollm2(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2-135M-Instruct as a GGUF file."""

    def fetch(folder: Path) -> None:
        command = [shared / "get_smollm2.sh", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            missing(f"SmolLM2 ({done.stderr.strip().splitlines()[-1:]})")

    return made_once(tmp_path_factory, "smollm2", fetch)


@pytest.fixture(scope="session")
def smollm2_storage(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage that holds SmolLM2 as a sweep converts it, and nothing else."""
    from orchestrator.run.compute import run_shared
    from orchestrator.spec.stages import ConvertStage
    from orchestrator.store.artifacts import Store
    from trainers.storage import digest_file

    def convert(storage: Path) -> None:
        (file,) = smollm2.glob("*.gguf")
        stage = ConvertStage(file=str(file), digest=digest_file(file), name="smollm2")
        run_shared(stage, Store(storage), print)

    return made_once(tmp_path_factory, "smollm2-storage", convert)


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_storage: Path) -> Path:
    """SmolLM2 as an ordinary Hugging Face folder in fp32."""
    (folder,) = smollm2_storage.glob("artifacts/convert/*/*/model")
    return folder


def save_tiny_llama(folder: Path, tokenizer: Any, *, seed: int, tied: bool, **options: Any) -> None:
    """A Hugging Face folder: two llama layers, random weights from a seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.1,
            **options,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with the tiny world's tokenizer and tied embeddings."""
    from trainers.models.tiny import build_tokenizer

    def save(folder: Path) -> None:
        save_tiny_llama(folder, build_tokenizer(), seed=0, tied=True)

    return made_once(tmp_path_factory, "tiny-model", save)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database without runs: migrating takes seconds, copying nothing."""
    from tests.faults.lives import forked, output
    from tests.faults.tracking_server import migrated_database

    def migrate(folder: Path) -> None:
        folder.mkdir()
        process = forked(folder / "migration", migrated_database, (folder,))
        process.join(120)
        assert process.exitcode == 0, output(folder / "migration")

    return made_once(tmp_path_factory, "empty-database", migrate) / "mlflow.db"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Where an S3 server answers on loopback."""
    with running_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, which this process can reach."""
    made = new_bucket(s3_endpoint, tmp_path / "cache")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made
