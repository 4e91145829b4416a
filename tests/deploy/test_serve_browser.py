"""`mixer serve` in a real browser: Chromium without a window."""

from pathlib import Path

import pytest

import allmlp as am
from allmlp.data.sources import open_source
from browser import PROGRAM, browser
from serving import running

pytest.importorskip("uvicorn", reason="the extra serve is absent")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")]


def test_an_image_and_what_it_excites(trained: am.TrainResult, tmp_path: Path):
    digit = tmp_path / "digit.png"
    digit.write_bytes(open_source("digits:test").read(0))
    (expected,) = am.predict(trained.run_folder, digit)
    with running(trained.run_folder) as port, browser(tmp_path / "profile") as page:
        url = f"http://127.0.0.1:{port}"
        page.open(url)
        page.wait("document.querySelectorAll('#layer option').length > 1")
        assert "10 classes · 8x8 pixels · float32" in page.text("#about")
        page.choose("#file", digit)
        page.wait("document.querySelectorAll('#classes li').length == 5")
        names = page.run("[...document.querySelectorAll('#classes .name')].map(e => e.innerText)")
        assert names == [name for name, _ in expected.classes]
        assert page.text("#classes .value") == f"{100 * expected.classes[0][1]:.1f} %"
        widths = page.run(
            "[...document.querySelectorAll('.bar')].map(b => b.getBoundingClientRect().width)"
        )
        assert len(widths) == 5
        assert widths == sorted(widths, reverse=True)
        page.wait("document.querySelector('#occlusion .note').textContent.includes('falls')")
        assert f"The probability of {expected.classes[0][0]}," in page.text("#occlusion .note")
        shown = page.wait(
            "[...document.images].filter(i => i.naturalWidth > 0 && i.offsetWidth)"
            ".map(i => [i.id, i.alt])"
        )
        assert {"picture", "seen", "map"} <= {name for name, _ in shown}
        assert len(shown) == 3 + 2 * 4 * 3  # layers, units, images of each
        assert all(text for _, text in shown)
        page.run(
            "{const s = document.querySelector('#layer'); s.value = 2;"
            " s.dispatchEvent(new Event('change'))}"
        )
        page.wait("document.querySelector('#layers h3').textContent.startsWith('Layer 2')")
        assert page.run("document.querySelectorAll('#layers .unit').length") == 4
        assert page.complaints() == []
        asked = {address.removeprefix(url) for address in page.requests()}
        pages = {"/", "/page.css", "/page.js", "/start.js"}
        assert {*pages, "/model", "/predict", "/occlusion", "/units", "/units?layer=2"} <= asked
        assert {
            address for address in asked if not address.startswith(("/", "data:", "blob:"))
        } == set()
