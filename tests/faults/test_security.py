"""What a model's folder may not do, and where a secret may not go."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import Environment

from orchestrator.spec.redaction import MASK, redacted, scrub, take_credentials
from orchestrator.spec.selection import parse_model
from orchestrator.store.artifacts import Store
from tests.conftest import save_tiny_llama
from tests.faults.lives import lived
from tests.faults.watching import leaks
from trainers.data.records import Message
from trainers.errors import DataError, SpecError, StorageError
from trainers.pairs.templates import load_tokenizer, render
from trainers.specs import clean_name
from trainers.storage import seal

ROOT = Path(__file__).resolve().parents[2]
GRID = ROOT / "sweeps" / "full_grid.py"
SMALL = (
    "--profile",
    "laptop",
    "--rewards",
    "ex_rm",
    "--train-sets",
    "tiny_world",
    "--eval-sets",
    "tiny_world",
)
SMALL += ("--max-trials", "1", "--epochs", "1", "--max-train-pairs", "4", "--max-eval-pairs", "4")
INLINE = ("--backend", "inline")
CANARIES = {
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary01",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret/access02",
    "AWS_SESSION_TOKEN": "canary-aws-session-token03",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-password04",
    "OPENAI_API_KEY": "sk-canary-openai-key-000005",
    "MY_SERVICE_TOKEN": "canary-my-service-token06",
}
PASSWORD = "canary-uri-password07"


def grid(folder: Path, *arguments: str, script: Path = GRID, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, its home and storage there, too."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "RMSWEEP_", "MLFLOW_"))
    }
    own = {
        "HOME": str(folder / "home"),
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": str(ROOT),
    }
    (folder / "home").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(script), *arguments, "--storage", str(folder / "store")],
        cwd=folder,
        env={**kept, **own, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )


# --- booby-trapped folders -------------------------------------------------------------------------------------


class Pickled:
    """Unpickling it makes the folder `sprung`."""

    def __init__(self, sprung: Path) -> None:
        self._sprung = sprung

    def __reduce__(self) -> object:
        return os.mkdir, (str(self._sprung),)


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A sound tiny llama whose folder holds every kind of code that a loader might run; it would make `sprung`."""
    from trainers.models.tiny import build_tokenizer

    folder = tmp_path / "trapped"
    save_tiny_llama(folder, build_tokenizer(), seed=0, tied=True)
    spring = f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).mkdir(exist_ok=True)\n"
    classes = {
        "configuration_trap": "from transformers import LlamaConfig\nclass TrapConfig(LlamaConfig): pass\n",
        "modeling_trap": "from transformers import LlamaForCausalLM, LlamaForSequenceClassification\n"
        "from .configuration_trap import TrapConfig\n"
        "class TrapModel(LlamaForCausalLM): config_class = TrapConfig\n"
        "class TrapReward(LlamaForSequenceClassification): config_class = TrapConfig\n",
        "tokenization_trap": "from transformers import PreTrainedTokenizerFast\nclass TrapTokenizer(PreTrainedTokenizerFast): pass\n",
        "__init__": "",
        "sitecustomize": "",
        "conftest": "",
    }
    for name, code in classes.items():
        (folder / f"{name}.py").write_text(spring + code)
    models = {"AutoModelForCausalLM": "TrapModel", "AutoModelForSequenceClassification": "TrapReward"}
    auto_map = {name: f"modeling_trap.{kind}" for name, kind in models.items()}
    amend(folder / "config.json", auto_map={"AutoConfig": "configuration_trap.TrapConfig", **auto_map})
    amend(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_trap.TrapTokenizer"]},
    )
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(tmp_path / "sprung")))
    return folder


def amend(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder_with_code_in_it_runs_none_of_it(trapped: Path, tmp_path: Path):
    # From inside the folder, where an interpreter might look for modules.
    done = grid(tmp_path, "run", "--models", str(trapped), *SMALL, *INLINE)
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "sprung").exists()
    assert "1/1 complete" in done.stdout


def test_the_trap_is_armed_where_the_user_trusts_it(trapped: Path, tmp_path: Path):
    # A head on a base of the folder's own would ask for more classes than this folder has.
    small = [word.replace("ex_rm", "im_rm") for word in SMALL]
    said = lived(
        tmp_path / "store", ("run", "--models", str(trapped), *small, *INLINE, "--trust-remote-code")
    )
    assert (tmp_path / "sprung").exists(), said


def test_pickles_in_the_place_of_safetensors_are_never_unpickled(trapped: Path, tmp_path: Path):
    (trapped / "model.safetensors").unlink()
    command = ("run", "--models", str(trapped), *SMALL, *INLINE)
    said = lived(tmp_path / "store", command, exits=2)
    assert "pytorch_model.bin is a pickle" in said
    assert "--allow-pickle" in said
    lived(tmp_path / "store", (*command, "--allow-pickle"), exits=3)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((trapped / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap is armed"


@pytest.mark.parametrize(
    "template",
    [
        "{{{{ cycler.__init__.__globals__.os.mkdir({path!r}) }}}}",
        "{{{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}}}",
        "{{{{ messages.append(1) }}}}",
    ],
)
def test_a_chat_template_reaches_nothing_of_python(tiny_model: Path, tmp_path: Path, template: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    text = template.format(path=str(tmp_path / "sprung"))
    (folder / "chat_template.jinja").write_text(text)
    with pytest.raises(DataError, match="refuses a conversation"):
        render(load_tokenizer(str(folder)), [Message("user", "a")], add_generation_prompt=False)
    assert not (tmp_path / "sprung").exists()
    if "mkdir" in text:
        Environment().from_string(text).render(messages=[])
        assert (tmp_path / "sprung").exists(), "the trap is armed"


# --- secrets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("value of MY_SERVICE_TOKEN: canary-my-service-token06.", f"value of MY_SERVICE_TOKEN: {MASK}."),
        ("canary%2Faws%2Bsecret%2Faccess02", MASK),
        ("http://user:pass@host:1/x", f"http://user:{MASK}@host:1/x"),
        ("postgresql://me:p@ss@host/db", f"postgresql://me:{MASK}@host/db"),
        ("https://host/x?access_token=abc&n=1", f"https://host/x?access_token={MASK}&n=1"),
        ("hf_abcdefghijklmnopqrstuv", MASK),
        ("key AKIAABCDEFGHIJKLMNOP", f"key {MASK}"),
        ("sk-abcdefghijklmnopqrst", MASK),
        ("http://127.0.0.1:5000/x:y@z", "http://127.0.0.1:5000/x:y@z"),
        ("a short value, tiny, stays", "a short value, tiny, stays"),
        ("/home/me/.ray/auth_token", "/home/me/.ray/auth_token"),
        ("12 tokens/s, max_prompt_tokens 1024, task-abc", "12 tokens/s, max_prompt_tokens 1024, task-abc"),
    ],
)
def test_secrets_are_masked_and_nothing_else(monkeypatch, text: str, clean: str):
    for name, value in {
        **CANARIES,
        "SHORT_TOKEN": "tiny",
        "RAY_AUTH_TOKEN_PATH": "/home/me/.ray/auth_token",
    }.items():
        monkeypatch.setenv(name, value)
    assert redacted(text) == clean


def test_credentials_of_a_tracking_server_leave_its_uri(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    assert take_credentials(f"https://me:{PASSWORD}@host:5000/a?b=c") == "https://host:5000/a?b=c"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == PASSWORD
    assert take_credentials("sqlite:////a/mlflow.db") == "sqlite:////a/mlflow.db"


def test_a_log_is_scrubbed_of_what_no_formatter_saw(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", CANARIES["MY_SERVICE_TOKEN"])
    log = tmp_path / "driver.log"
    log.write_bytes(b"\xff before canary-my-service-token06 after\n")
    scrub(log)
    assert log.read_bytes() == b"\xff before *** after\n"


# A sweep with a defect: what a command imports at its end raises errors that hold every secret it can find.
INJECTED = """
import os, sys
sys.path.insert(0, {root!r})
import orchestrator.{module} as broken
def fail(*arguments, **named):
    import logging
    told = " ".join(os.environ[name] for name in {names!r}) + " {uri}"
    logging.getLogger("library").error("about to fail with %s", told)
    if {raw}:
        os.write(2, told.encode())
    raise {error}(told)
broken.{function} = fail
from pathlib import Path
from orchestrator.cli.main import Grid, main
from sweeps.full_grid import full_grid
main(Grid(build=full_grid), Path({root!r}) / "sweeps" / "full_grid.py")
"""
URI = f"http://user:{PASSWORD}@127.0.0.1:9/"


def injected(folder: Path, module: str, function: str, error: str = "RuntimeError") -> Path:
    script = folder / "injected.py"
    # Straight to a descriptor, past every formatter: as C code does while the sweep runs.
    values = {
        "root": str(ROOT),
        "names": list(CANARIES),
        "uri": URI,
        "error": error,
        "raw": module == "run.compute",
    }
    script.write_text(INJECTED.format(module=module, function=function, **values))
    return script


def require_no_secret(done: subprocess.CompletedProcess[str], folder: Path, *roots: Path) -> None:
    """No canary in what was said or written; `folder` holds working folder, home and storage."""
    secrets = [*CANARIES.values(), PASSWORD]
    assert [secret for secret in secrets if secret in done.stdout] == []
    assert [leak for leak in leaks(secrets, folder, *roots) if "injected.py" not in leak] == []


def test_no_secret_is_written_by_a_trial_that_fails_or_a_tracking_server_that_does_not_answer(
    tiny_model: Path, tmp_path: Path
):
    script = injected(tmp_path, "run.compute", "_tokens")
    flags = ("run", "--models", str(tiny_model), *SMALL, *INLINE, "--tracking-uri", URI)
    done = grid(tmp_path, *flags, script=script, **CANARIES)
    assert done.returncode == 3, done.stdout
    assert f"RuntimeError: {MASK}" in done.stdout
    assert "the MLflow view is incomplete" in " ".join(done.stdout.split())
    (log,) = [file for file in (tmp_path / "store").rglob("logs/*.log") if file.name != "driver.log"]
    assert f"RuntimeError: {MASK}" in log.read_text()
    driver = (log.parent / "driver.log").read_text()
    assert f"about to fail with {MASK}" in driver
    assert f"\n{MASK} " in driver, "what was written past the formatters"
    require_no_secret(done, tmp_path)


@pytest.mark.parametrize(("error", "code"), [("RuntimeError", 1), ("broken.SpecError", 2)])
def test_no_secret_is_written_by_a_defect_or_a_refusal(tmp_path: Path, error: str, code: int):
    script = injected(tmp_path, "spec.resolve", "_require_distinct_names", error)
    database = f"postgresql://user:{PASSWORD}@127.0.0.1:9/db"
    flags = ("run", "--models", "llama-64", *SMALL, *INLINE, "--tracking-uri", database)
    done = grid(tmp_path, *flags, script=script, **CANARIES)
    assert done.returncode == code, done.stdout
    assert f"about to fail with {MASK}" in done.stdout
    if code == 1:
        assert f"RuntimeError: {MASK}" in (tmp_path / "rmsweep-error.log").read_text()
    require_no_secret(done, tmp_path)


# --- paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/passwd", "a/../../b", "a\0b", "..", "a\\..\\b", "-rf", "x" * 5000, "…"]
)
def test_a_name_is_a_single_step_into_a_folder(name: str, tmp_path: Path):
    try:
        cleaned = clean_name(name)
    except SpecError:
        return
    assert (tmp_path / cleaned).resolve().parent == tmp_path.resolve()
    assert len(cleaned) <= 100
    assert not cleaned.startswith(("-", "."))
    assert parse_model(f"{cleaned}=llama-64").name == cleaned


_OUTSIDE = ["../other", "/etc", "a/../../b", "", ".", "a\0b", ".."]


@pytest.mark.parametrize(
    ("where", "name"),
    [*(("attempt", name) for name in [*_OUTSIDE, 7, ["a"]]), *(("files", name) for name in _OUTSIDE)],
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path: Path, where: str, name: object):
    store = Store(tmp_path)
    with store.write("train", "key") as attempt:
        (attempt.directory / "weights").write_text("x")
    file = tmp_path / "artifacts" / "train" / "key" / "manifest.json"
    amend(file, **{where: name if where == "attempt" else {name: {"sha256": "", "size": 1}}})
    # Whoever wrote it sealed it as well: the seal is a digest, no signature.
    amend(file, sha256=seal(json.loads(file.read_text())))
    for read in (store.manifest, store.read):
        with pytest.raises(StorageError, match="leads out of its folder"):
            read("train", "key")
