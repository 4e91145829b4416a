"""report.html: one file with everything inside, all text escaped."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

import allmlp as am
from conftest import make_class_folder, ran, tiny_run

EVIL = "<script>alert('x')<"  # no slash: it is the name of a folder


class Page(HTMLParser):
    """Its text; nothing of it is fetched or run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        content = path.read_text()
        assert "@import" not in content
        assert "url(" not in content
        self.images, self.text = 0, ""
        self.feed(content)
        assert self.images

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert (value or "").startswith("data:image/")
                self.images += 1

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_and_its_evaluation(capsys, tmp_path: Path):
    data = tmp_path / "data & more"
    make_class_folder(data / "train", {EVIL: 6, "bee": 6})
    make_class_folder(data / "test", {EVIL: 3, "bee": 3}, start=50)
    run = tmp_path / "run"
    tiny_run(data, run)
    last = (run / "log.txt").read_text().splitlines()[-1]
    assert last == f"report   {run / 'report.html'}"
    report = Page(run / "report.html")
    result = am.evaluate(run, str(data))
    assert result.summary() in report.text
    assert f"On {len(result.labels)} test images" in report.text
    assert EVIL in report.text
    assert f"few training images, fewer than 20: {EVIL} (5), bee (5)" in report.text
    for command in ("predict", "evaluate", "export", "serve", "push"):
        assert f"mixer {command} " in report.text
    assert "epochs = 2" in report.text
    assert "model.overrides.hidden_dim = 16" in report.text
    wrong = [data / "test" / EVIL, data / "test" / "bee"][int(result.labels[result.mistakes()[0]])]
    assert str(wrong) in report.text
    out, _ = ran(capsys, "evaluate", run, "--data", data, "--output", tmp_path / "out")
    assert out.splitlines()[-1] == f"report   {tmp_path / 'out' / 'report.html'}"
    other = Page(tmp_path / "out" / "report.html")
    assert result.summary() in other.text
    assert EVIL in other.text


def test_without_images_to_measure(class_folder, tmp_path: Path):
    source = f"{class_folder}:train"
    tiny_run(source, tmp_path / "run", data__holdout=0.0)
    report = Page(tmp_path / "run/report.html")
    assert "none are left to measure" in report.text


@pytest.mark.parametrize(("last", "said"), [("0.9", True), ("0.55", False)])
def test_overfitting_is_said(class_folder, tmp_path: Path, monkeypatch, last, said):
    rows = [
        {"training_loss": "0.8", "validation_loss": "0.5"},
        {"training_loss": "0.1", "validation_loss": last},
    ]
    monkeypatch.setattr("allmlp.training.report.read_results", lambda _: rows)
    tiny_run(class_folder, tmp_path / "run")
    assert ("overfitting: the" in Page(tmp_path / "run/report.html").text) == said
