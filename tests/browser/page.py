"""A headless Chromium, and what a person does with MLflow's pages in it."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By

from tests.conftest import missing

PATIENCE_S = 120.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--window-size=1400,900",
)
# MLflow's own: it asks for a user where none can log in, and its grid resizes itself while it is drawn.
NOT_OURS = ("mlflow/users/current", "ResizeObserver loop")
TROUBLE = ("Something went wrong", "error occurred", "Internal Server Error", "Failed to", "page not found")
Found = TypeVar("Found")


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Debian's Chromium; its profile is kept in `profile`."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        missing("chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    try:
        driver.set_page_load_timeout(PATIENCE_S)
        yield driver
    finally:
        driver.quit()


def until(condition: Callable[[], Found], what: str) -> Found:
    """What `condition` gives once that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(StaleElementReferenceException):
            if found := condition():
                return found
        time.sleep(0.25)
    raise AssertionError(f"no {what} within {PATIENCE_S:.0f} s")


def elements(driver: webdriver.Chrome, selector: str) -> list[Any]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def text(driver: webdriver.Chrome) -> str:
    """Everything that the page says."""
    return str(driver.execute_script("return document.body.innerText"))


def require_no_trouble(driver: webdriver.Chrome) -> None:
    """No error is on the page, and none of ours in the console since the last call."""
    said = text(driver)
    assert not [words for words in TROUBLE if words.lower() in said.lower()], said[:2000]
    assert not elements(
        driver, "[role=alert][class*=error], .ant-notification-notice-error, .ant-alert-error"
    )
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in severe if not any(words in message for words in NOT_OURS)], severe


def run_names(driver: webdriver.Chrome) -> list[str]:
    """Names in the list of runs, in its order, those outside the window included."""
    script = """
        const links = [...document.querySelectorAll('.ag-pinned-left-cols-container .ag-row')]
        links.sort((a, b) => +a.getAttribute('row-index') - +b.getAttribute('row-index'))
        return links.map(row => row.querySelector('a')?.textContent).filter(Boolean)"""
    return list(driver.execute_script(script))


def choose_run(driver: webdriver.Chrome, row: int) -> None:
    """Tick the box of the run in this row."""
    box = f'.ag-pinned-left-cols-container .ag-row[row-index="{row}"] input.ag-checkbox-input'
    until(lambda: elements(driver, box), f"row {row}")
    driver.execute_script("document.querySelector(arguments[0]).click()", box)
    until(lambda: any(item.is_selected() for item in elements(driver, box)), f"tick in row {row}")


def press(driver: webdriver.Chrome, label: str) -> None:
    """Press the button that says `label`."""
    script = """
        const found = [...document.querySelectorAll('button')].find(
            item => item.innerText.trim() === arguments[0] && !item.disabled)
        found?.click()
        return Boolean(found)"""
    until(lambda: driver.execute_script(script, label), f"button {label}")


def close_assistant(driver: webdriver.Chrome) -> None:
    """Close the panel that takes a quarter of the window."""
    script = "document.querySelector(\"[data-component-id='mlflow.assistant.chat_panel.close']\")?.click()"
    driver.execute_script(script)


def picture(driver: webdriver.Chrome, file: Path) -> None:
    """A screenshot of the window, once what moves has come to rest."""
    time.sleep(2.0)
    assert driver.save_screenshot(str(file))
