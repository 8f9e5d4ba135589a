"""Two hundred runs in MLflow's page and in a real browser: listed, grouped, compared, the report opened, no error.

Screenshots of what was seen are left in $RMSWEEP_SCREENSHOTS, or in the test's folder.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from selenium import webdriver

from orchestrator.report.page import write_full_report
from orchestrator.store.artifacts import Store
from orchestrator.store.records import write_declaration
from orchestrator.tracking.database import default_uri
from orchestrator.tracking.mlflow import sync
from tests.browser import page
from tests.faults.tracking_server import free_port, runs_of
from tests.orchestrator.simulated import ULTRAFEEDBACK, simulated_sweep

# MLflow's and SQLAlchemy's own deprecations are not ours to fail on.
pytestmark = pytest.mark.filterwarnings("default")
ROOT = Path(__file__).resolve().parent.parent.parent
TRIALS = 200
MODELS = (
    "pythia-1b",
    "qwen2.5-1.5b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "gemma-2-2b",
    "llama-3.1-8b",
)
# It stands in every picture.
NAME = "simulated"
# MLflow's page asks for so many at a time; the parent of runs that are shown comes on top.
FIRST_PAGE = 100
COMPARED = 20


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """First of all, so that nothing is built where no browser is."""
    with page.browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def store(driver: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Store:
    """Two hundred simulated trials with their report and their view."""
    store = Store(tmp_path_factory.mktemp("sweep") / "store")
    declared = simulated_sweep(
        store,
        name=NAME,
        models=MODELS,
        train_sets=("ultrafeedback", "rewardmath"),
        seeds=range(-(-TRIALS // (len(MODELS) * 4))),
        sets=ULTRAFEEDBACK[:3],
        pairs=30,
        steps=12,
    )
    declared = replace(declared, trials=declared.trials[:TRIALS])
    write_declaration(declared, store)
    shutil.copy(empty_database, store.root / "mlflow.db")
    sync(default_uri(store), store, declared, write_full_report(declared, store))
    return store


@pytest.fixture(scope="module")
def addresses(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of the sweep's runs and charts, as `ui` prints them."""
    folder = tmp_path_factory.mktemp("ui")
    command = [sys.executable, str(ROOT / "sweeps" / "full_grid.py"), "ui", "--storage", str(store.root)]
    command += ["--name", NAME, "--port", str(free_port())]
    said = folder / "said.txt"
    with said.open("w") as sink:
        server = subprocess.Popen(command, cwd=folder, stdout=sink, stderr=sink, start_new_session=True)
    try:
        page.until(lambda: server.poll() is not None or "its charts:" in said.read_text(), "addresses")
        yield dict(re.findall(r"its (\w+): (\S+)", said.read_text()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def address(addresses: dict[str, str]) -> str:
    return addresses["runs"]


def test_runs_are_listed_under_their_sweep_and_twenty_compared(
    driver: webdriver.Chrome, address: str, pictures: Path
):
    driver.get(address)
    # Opened by the address alone: the runs below the sweep's, with the columns that answer.
    # The sweep's run began before all others; MLflow shows it above the page of the newest ones.
    page.until(lambda: f"{FIRST_PAGE + 1} matching runs" in page.text(driver), "first page of runs")
    # The page draws those rows that are in view or near it.
    parent, *names = page.run_names(driver)
    assert parent == NAME
    assert len(names) > COMPARED
    for name in names:
        assert re.fullmatch(r"[a-z0-9.-]+ · (ex|im)_rm · (ultrafeedback|rewardmath) · s\d", name), name
    page.close_assistant(driver)
    heads = page.text(driver)
    assert all(column in heads for column in ("category/in-d", "model", "reward")), heads
    page.require_no_trouble(driver)
    page.picture(driver, pictures / "mlflow_runs.png")
    for row in range(1, COMPARED + 1):
        page.choose_run(driver, row)
    page.press(driver, "Compare")
    page.until(lambda: f"Comparing {COMPARED} Runs" in page.text(driver), "comparison")
    page.until(lambda: page.elements(driver, ".js-plotly-plot svg"), "plot of the comparison")
    compared = page.text(driver)
    for name in names[:COMPARED]:
        assert name in compared
    page.require_no_trouble(driver)
    page.picture(driver, pictures / "mlflow_comparison.png")


def test_charts_are_filled_with_the_means_of_each_reward_type(
    driver: webdriver.Chrome, addresses: dict[str, str], pictures: Path
):
    driver.get("about:blank")
    driver.get(addresses["charts"])
    page.until(lambda: len(page.elements(driver, ".js-plotly-plot .bars path")) >= 8, "bars")
    page.close_assistant(driver)
    said = page.text(driver)
    assert (
        said.index("Accuracy by category")
        < said.index("category/in-distribution/accuracy")
        < said.index("train\n")
    )
    for reward in ("ex_rm", "im_rm"):
        assert f"reward: {reward}, train_set: ultra" in said
    page.require_no_trouble(driver)
    page.picture(driver, pictures / "mlflow_charts.png")


def test_a_filter_of_the_address_leaves_the_runs_of_one_reward_type(driver: webdriver.Chrome, address: str):
    base = address.split("?")[0]
    driver.get("about:blank")
    driver.get(f"{base}?workflowType=machine_learning&searchFilter=params.reward+%3D+%22im_rm%22")
    names = page.until(lambda: len(page.run_names(driver)) > COMPARED and page.run_names(driver), "runs")
    # MLflow shows the parent, which has no parameters, for the sake of the order.
    assert [name for name in names if " · im_rm · " not in name] in ([], [NAME])
    page.require_no_trouble(driver)


def test_a_trial_is_a_logged_model_with_its_evaluations(
    driver: webdriver.Chrome, address: str, store: Store, pictures: Path
):
    uri = default_uri(store)
    run = next(run for run in runs_of(uri, NAME) if run.data.tags["rmsweep.role"] == "trial")
    model = MlflowClient(tracking_uri=uri).get_logged_model(run.outputs.model_outputs[0].model_id)
    models = address.split("?")[0].replace("/runs", "/models")
    driver.get("about:blank")
    driver.get(f"{models}/{model.model_id}")
    page.until(lambda: "eval/ultrafeedback/accuracy" in page.text(driver), "metrics of the model")
    said = page.text(driver)
    assert model.name in said
    assert "train/loss" not in said
    page.require_no_trouble(driver)
    page.picture(driver, pictures / "mlflow_model.png")


def test_the_report_opens_in_the_artifact_view_and_alone(
    driver: webdriver.Chrome, address: str, store: Store, pictures: Path
):
    uri = default_uri(store)
    parent = next(run for run in runs_of(uri, NAME) if run.data.tags["rmsweep.role"] == "sweep")
    runs = address.split("?")[0]
    driver.get("about:blank")
    driver.get(f"{runs}/{parent.info.run_id}/artifacts/report/report.html")
    frame = page.until(lambda: page.elements(driver, "iframe"), "frame of the report")[0]
    driver.switch_to.frame(frame)
    heading = page.until(lambda: page.elements(driver, "h1"), "report")[0].text
    assert NAME in heading
    page.until(lambda: len(page.elements(driver, "table")) > 3, "tables of the report")
    page.until(lambda: len(page.elements(driver, "figure svg, figure img")) > 3, "figures of the report")
    assert len(page.elements(driver, "table")) > 3
    assert len(page.elements(driver, "figure svg, figure img")) > 3
    driver.switch_to.default_content()
    page.require_no_trouble(driver)
    folder = Path(MlflowClient(tracking_uri=uri).download_artifacts(parent.info.run_id, "report"))
    driver.get((folder / "report.html").as_uri())
    page.require_no_trouble(driver)
    page.picture(driver, pictures / "report.png")
