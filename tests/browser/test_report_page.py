"""A sweep's report in a real browser: wide, narrow and on a phone, light and dark, and on paper; screenshots are left beside MLflow's."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from orchestrator.report.page import write_full_report
from orchestrator.store.artifacts import Store
from tests.browser import page
from tests.orchestrator.simulated import simulated_sweep

WIDTHS = (1400, 800, 390)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A browser that shows the report of a small sweep."""
    with page.browser(tmp_path_factory.mktemp("chromium")) as started:
        store = Store(tmp_path_factory.mktemp("sweep") / "store")
        declared = simulated_sweep(store, models=("llama-3.2-1b", "qwen2.5-1.5b"), pairs=30, steps=6)
        started.get((write_full_report(declared, store).folder / "report.html").as_uri())
        yield started


def look(driver: webdriver.Chrome, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_at_any_width(driver: webdriver.Chrome, pictures: Path, width: int, scheme: str):
    look(driver, width, scheme)
    # The page never moves sideways; in a box of its own a table may, and hides no row.
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    boxes = "[...document.querySelectorAll('.scroll')]"
    assert driver.execute_script(f"return {boxes}.every(box => box.scrollHeight <= box.clientHeight)")
    if width == WIDTHS[0]:
        assert driver.execute_script(f"return {boxes}.every(box => box.scrollWidth <= box.clientWidth)")
    wide = "[...document.querySelectorAll('figure')].map(item => item.querySelector('img').width - item.clientWidth)"
    assert all(gap >= 0 for gap in driver.execute_script(f"return {wide}"))
    ink, paper = (
        sum(
            map(
                int,
                re.findall(r"\d+", driver.execute_script(f"return getComputedStyle(document.body).{name}"))[
                    :3
                ],
            )
        )
        for name in ("color", "backgroundColor")
    )
    assert (ink < paper) == (scheme == "light")
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": False})
    (pictures / f"report_{width}_{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    page.require_no_trouble(driver)


def test_on_a_phone_the_first_column_stays_while_a_table_moves(driver: webdriver.Chrome):
    look(driver, 390, "light")
    moved = """
        const box = document.getElementById('differences').parentElement.querySelector('#differences ~ .scroll')
        const [first, second] = box.querySelectorAll('tbody td')
        const before = [first, second].map(item => item.getBoundingClientRect().left)
        box.scrollLeft = 60
        const after = [first, second].map(item => item.getBoundingClientRect().left)
        box.scrollLeft = 0
        return before.map((left, number) => left - after[number])"""
    assert driver.execute_script(moved) == [0, 60]


def test_a_click_sorts_and_marks_the_column(driver: webdriver.Chrome):
    look(driver, 1400, "light")
    sort = """
        const head = [...document.querySelectorAll('#differences ~ .scroll th')][4]
        head.querySelector('button').click()
        const cells = [...head.closest('table').tBodies[0].rows].map(row => +row.cells[4].dataset.sort)
        return [cells, getComputedStyle(head.querySelector('button'), '::after').content]"""
    (up, rising), (down, falling) = (driver.execute_script(sort) for _ in range(2))
    assert (up, down) == (sorted(up), sorted(up, reverse=True))
    assert (rising, falling) == ('" ▲"', '" ▼"')


def test_paper_takes_every_row(driver: webdriver.Chrome, pictures: Path):
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    # A sheet of A4 without its margins.
    size = {"width": 718, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    boxes = "[...document.querySelectorAll('.scroll')]"
    assert driver.execute_script(f"return {boxes}.every(box => box.scrollWidth <= box.clientWidth)")
    assert driver.execute_script(
        "return [...document.querySelectorAll('tr')].every(row => row.offsetHeight > 0)"
    )
    (pictures / "report.pdf").write_bytes(
        base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    )
