"""`mixer serve` in a real browser: Chromium without a window, by its own driver.

Needs `pip install selenium` and the programs chromium and chromedriver; nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import allmlp as am
from allmlp.data.sources import open_source
from serving import serving

pytest.importorskip("uvicorn", reason="the extra serve is absent")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here"),
    pytest.mark.skipif(DRIVER is None, reason="no chromedriver here"),
]


@pytest.fixture(scope="module")
def url(trained: am.TrainResult) -> Iterator[str]:
    with serving(trained.run_folder) as (address, _):
        yield address


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get("about:blank")
        for kind in ("browser", "performance"):
            driver.get_log(kind)  # of the page that a browser begins with
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    path.write_bytes(open_source("digits:test").read(0))
    return path


def wait(browser: Any, script: str) -> Any:
    """Returns what a script gives once it is true."""
    return WebDriverWait(browser, 60).until(lambda page: page.execute_script(f"return {script}"))


def text(browser: Any, place: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, place).text


def choose(browser: Any, *paths: Path) -> None:
    browser.find_element(By.ID, "file").send_keys("\n".join(map(str, paths)))


def check_requests(browser: Any, url: str) -> set[str]:
    """Returns the paths that were asked for; nobody but the server was, and nothing went wrong."""
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    own = (f"{url}/", "data:", "blob:", "about:", "chrome:")
    strangers = [url for url in asked if not url.startswith(own)]
    assert strangers == []
    return {address.removeprefix(url) for address in asked if address.startswith(url)}


def test_an_image_and_what_it_excites(browser, url, digit, trained):
    (expected,) = am.predict(trained.run_folder, digit)
    browser.get(url)
    wait(browser, "document.querySelectorAll('#layer option').length > 1")
    assert "10 classes · 8x8 pixels · float32" in text(browser, "#about")
    choose(browser, digit)
    wait(browser, "document.querySelectorAll('#classes li').length == 5")
    names = [element.text for element in browser.find_elements(By.CSS_SELECTOR, "#classes .name")]
    assert names == [name for name, _ in expected.classes]
    assert text(browser, "#classes .value") == f"{100 * expected.classes[0][1]:.1f} %"
    widths = browser.execute_script(
        "return [...document.querySelectorAll('.bar')].map(b => b.getBoundingClientRect().width)"
    )
    assert len(widths) == 5
    assert widths == sorted(widths, reverse=True)
    wait(browser, "document.querySelector('#occlusion .note').textContent.includes('falls')")
    assert f"The probability of {expected.classes[0][0]}," in text(browser, "#occlusion .note")
    shown = wait(browser, "[...document.images].filter(i => i.naturalWidth > 0 && i.offsetWidth)")
    sources = [image.get_attribute("id") for image in shown]
    assert {"picture", "seen", "map"} <= set(sources)
    assert len(shown) == 3 + 3 * 4 * 3  # layers, units, images of each
    assert all(image.get_attribute("alt") for image in shown)
    browser.find_element(By.CSS_SELECTOR, "#layer option[value='4']").click()
    wait(browser, "document.querySelector('#layers h3').textContent.startsWith('Layer 4')")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#layers .unit")) == 4
    asked = check_requests(browser, url)
    assert {"/", "/page.css", "/page.js", "/model", "/predict", "/occlusion", "/units"} <= asked
    assert "/units?layer=4" in asked
