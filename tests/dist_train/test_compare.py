"""Runs side by side, against statistics computed another way."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from dist_train.compare import compare, paired_bootstrap
from dist_train.compare_page import comparison_table, write_comparison
from sharding.errors import UserError, UserErrors

CLIPS = 80


def write_run(path: Path, labels: np.ndarray, noise: float, *, seed: int, extra: float = 0.0) -> np.ndarray:
    """A run directory; returns its absolute errors [n, 2]."""
    path.mkdir(parents=True)
    rng = np.random.default_rng()
    recipe = {"seed": seed, "loss": {"rs": extra}, "data": {"path": "data/demo"}}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path / "summary.json").write_text('{"test": {"floor": {"mae": 1.25}}}')
    predicted = labels[:, None] + rng.normal(scale=noise, size=(CLIPS, 2))
    with (path / "predictions_test.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "label", "complete", "missing"])
        rows.writerows([f"k{i}", f"{labels[i]:.6g}", *predicted[i]] for i in rng.permutation(CLIPS))
    return abs(predicted - labels[:, None])


def test_seeds_are_one_setting_and_differences_are_paired(tmp_path: Path) -> None:
    labels = np.random.default_rng().uniform(-3, 3, CLIPS).round(3)
    good = [write_run(tmp_path / f"good,seed={seed}", labels, 0.4, seed=seed) for seed in (0, 1, 2)]
    bad = [write_run(tmp_path / f"bad,seed={seed}", labels, 0.8, seed=seed, extra=0.1) for seed in (0, 1)]
    found, page = write_comparison(sorted(tmp_path.glob("*,seed=?"), reverse=True), None)
    first, second = found.settings
    assert (first.name, second.name) == ("good", "bad") and second.changes == {"loss.rs": "0.1"}
    assert first.seeds == [2, 1, 0] and first.floor == 1.25 and first.flows["complete"].difference is None
    for place, flow in enumerate(("complete", "missing")):
        maes = [errors[:, place].mean() for errors in good]
        assert first.flows[flow].mean == pytest.approx(np.mean(maes), abs=1e-5)
        assert first.flows[flow].deviation == pytest.approx(np.std(maes, ddof=1), abs=1e-5)
        differences = np.mean(bad, 0)[:, place] - np.mean(good, 0)[:, place]
        score = second.flows[flow]
        assert score.difference == pytest.approx(differences.mean(), abs=1e-5) and score.interval is not None
        # the interval of the mean is close to the normal one
        half = 1.96 * differences.std(ddof=1) / CLIPS**0.5
        assert score.interval == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.25 * half)
        assert score.p is not None and score.p < 0.05
    assert page == tmp_path / "comparison.html" and "good" in page.read_text()
    assert comparison_table(found).row_count == 2 and (tmp_path / "comparison.png").is_file()


def test_no_difference_is_rarely_found_where_there_is_none() -> None:
    rng = np.random.default_rng()
    hits = sum(paired_bootstrap(rng.normal(size=60), rng)[1] < 0.05 for _ in range(60))
    assert hits <= 12  # 3 expected; more than 12 has a probability of 1e-5
    same = paired_bootstrap(np.zeros(10), rng)
    assert same == ((0, 0), 1)


def test_runs_without_a_common_folder_need_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.linspace(-3, 3, CLIPS).round(3)
    for name in ("a", "b"):
        write_run(tmp_path / name, labels, 0.5, seed=0)
    monkeypatch.setattr("dist_train.compare_page.os.path.commonpath", lambda paths: "/")
    with pytest.raises(UserError, match=r"--output: is not given, and the runs have no folder in common"):
        write_comparison([tmp_path / "a", tmp_path / "b"], None)
    assert write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "out")[1].is_file()


def test_what_cannot_be_compared_is_named_at_once(tmp_path: Path) -> None:
    labels = np.linspace(-3, 3, CLIPS).round(3)
    for name in ("a", "b", "c", "d"):
        write_run(tmp_path / name, labels + (name == "b"), 0.5, seed=0)
    (tmp_path / "c" / "predictions_test.csv").unlink()
    text = (tmp_path / "d" / "predictions_test.csv").read_text()
    (tmp_path / "d" / "predictions_test.csv").write_text(text.replace("k5,", "k5,nan,"))
    with pytest.raises(UserErrors) as caught:
        compare([tmp_path / name for name in "abcd"])
    told = str(caught.value)
    assert "has other labels than" in told and "predictions_test.csv: cannot be read" in told
    assert "is damaged at k5" in told
    with pytest.raises(UserError, match=r"no such directory"):
        compare([tmp_path / "a", tmp_path / "nothing"])
