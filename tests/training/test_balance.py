"""Training on rare classes: `balance`, and the metric by which the best weights are chosen."""

import json
from pathlib import Path

import pytest

import allmlp as am
from conftest import make_class_folder
from runs import losses_of, results_of, run_config, train, unix


@unix
def test_a_run_that_an_older_version_began(data: Path, tmp_path: Path):
    """Without the new settings, and without the new columns of results.csv."""
    changes = {"steps": 9, "evaluate_every": 3}
    straight = train(run_config(data, tmp_path / "straight", **changes))
    run = train(run_config(data, tmp_path / "run", **changes), stop_after=4)
    values = json.loads((run / "config.json").read_text())
    del values["best_by"], values["data"]["balance"]
    (run / "config.json").write_text(json.dumps(values))
    old = ("epoch", "step", "validation_top1", "validation_loss", "seconds", "best")
    rows = [old, *([row[key] or "1.0" for key in old] for row in results_of(run))]
    (run / "results.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    train(run)
    assert losses_of(run) == losses_of(straight)
    expected = [[row[key] for key in old] for row in results_of(straight)]
    assert [[row[key] for key in old] for row in results_of(run)] == expected


@unix
@pytest.mark.parametrize("best_by", ["loss", "macro_f1"])
def test_the_best_weights(data: Path, tmp_path: Path, best_by: str):
    changes = {"best_by": best_by, "evaluate_every": 3, "patience": 3}
    run = train(run_config(data, tmp_path / "run", **changes))
    sign = -1.0 if best_by == "loss" else 1.0
    scores = [sign * float(row[f"validation_{best_by}"]) for row in results_of(run)]
    bests = [row["best"] == "1" for row in results_of(run)]
    assert len(set(scores)) > 2
    highest, since = float("-inf"), 0
    for score, is_best in zip(scores, bests, strict=True):
        assert is_best or score <= highest
        assert not is_best or score >= highest
        highest, since = max(highest, score), 0 if is_best else since + 1
    assert since == 3 or len(scores) == 10
    written = json.loads((run / "validation" / "evaluation.json").read_text())
    assert sign * written[best_by] == pytest.approx(max(scores), abs=1e-5)
    assert (
        f"the best validation {best_by.replace('_', ' ')}" in (run / "best/README.md").read_text()
    )


def test_a_rare_class_is_named_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_class_folder(tmp_path / "data" / "train", {"common": 30, "defect": 3})
    make_class_folder(tmp_path / "data" / "test", {"common": 4, "defect": 4}, start=500)
    changes = {"optimizer__learning_rate": 1e-6, "steps": 2, "evaluate_every": 1}
    for balance, said in (
        ("none", "note     'defect' is rare: balance"),
        ("weights", "balance  weights: defect weight 7.25, common weight 0.537"),
        ("sampler", "balance  sampler: defect images drawn 7.25 times an epoch, common images"),
    ):
        config = run_config(tmp_path / "data", tmp_path / balance, data__balance=balance, **changes)
        result = am.train(config)
        out = capsys.readouterr().out
        assert said in out
        warnings = result.test.warnings()
        assert all(f"warning  {line}\n" in out for line in warnings)
        assert "; 95% interval " in out
        written = json.loads((tmp_path / balance / "test" / "evaluation.json").read_text())
        assert written["warnings"] == warnings
        if balance == "none":
            assert warnings[0].startswith("never predicted: ")
            assert written["balanced_accuracy"] == 0.5
