"""Real runs of several world sizes, and whether the report says what their raw metrics say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dist_train.recipe import write_recipe
from dist_train.scaling import Point, Scaling
from tests import tiny
from tests.end_to_end.commands import call, metrics, run

CLIPS = 6  # of a rank


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of runs of 16 steps, with as many clips per rank; of 4 ranks only in the slower test."""
    folder = tmp_path_factory.mktemp("scaling")
    data = tiny.write_corpus(folder / "shards", train=48)
    write_recipe(tiny.recipe(data, training={"validate_every": 1000}), folder / "recipe.yaml")
    for ranks in (1, 2):
        train(folder, ranks)
    return folder


def train(folder: Path, ranks: int) -> None:
    changes = [f"data.batch={CLIPS * ranks}", f"training.epochs={2 * ranks}"]
    done = run(
        "train", folder / "recipe.yaml", *changes, "--output", folder / "runs" / str(ranks), "--ranks", str(ranks)
    )
    assert done.returncode == 0, done.stderr


def report(folder: Path, capsys: pytest.CaptureFixture[str]) -> Scaling:
    assert call("report", "--scaling", folder / "runs", "--json") == 0
    return Scaling.model_validate_json(capsys.readouterr().out)


def check(point: Point, path: Path) -> float:
    """Compares with arithmetic of its own on the raw lines; returns clips per second."""
    rows = metrics(path)[3:]  # two of warm-up, one that is measured for the plan
    seconds = sum(row["step_seconds"] for row in rows)
    rate = sum(row["clips"] for row in rows) / seconds
    assert point.steps == len(rows) == 13 and point.left_out == 3
    assert point.clips_per_second.value == pytest.approx(rate)
    assert point.tokens_per_second is not None and point.mfu is not None and point.exchange_share is not None
    assert point.tokens_per_second.value == pytest.approx(sum(row["tokens"] for row in rows) / seconds)
    assert point.mfu.value == pytest.approx(sum(row["mfu"] * row["step_seconds"] for row in rows) / seconds)
    share = sum(row["exchange_seconds"] for row in rows) / seconds
    assert point.exchange_share.value == pytest.approx(share) and 0 < share < 1
    between = [row["between_seconds"] for row in rows if row["between_seconds"] is not None]
    assert point.between_seconds == pytest.approx(np.mean(between)) and len(between) > 3
    assert point.clips_per_second.low is not None and point.clips_per_second.low < rate
    # Bytes: whole tensors given to the collectives, n of an all-reduce sent twice on a ring, of the others once.
    plan = json.loads((path / "plan.json").read_text())
    share_of_ring = (point.ranks - 1) / point.ranks
    sent = sum(n * (1 + (name == "all_reduce")) for name, n in plan["measured"]["wire_bytes"].items()) * share_of_ring
    assert point.wire is not None and point.wire.sent == pytest.approx(sent)
    assert point.wire.foretold_sent == pytest.approx(sent, rel=0.02)
    measured = plan["measured"]
    assert 0 <= measured["transfer_seconds"] <= measured["exchange_seconds"] and measured["exchange_steps"] == 13
    return rate


@pytest.mark.slow
def test_the_report_of_one_and_two_ranks(worlds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(worlds, capsys)
    rates = [check(point, worlds / "runs" / str(point.ranks)) for point in found.points[:2]]
    weak = next(one for one in found.series if one.kind == "weak")
    assert weak.clips == CLIPS and weak.entries[1].efficiency.value == pytest.approx(rates[1] / rates[0] / 2)
    low, high = weak.entries[1].efficiency.low, weak.entries[1].efficiency.high
    assert low is not None and high is not None and low < rates[1] / rates[0] / 2 < high
    assert (worlds / "runs" / "scaling.html").is_file() and (worlds / "runs" / "scaling_weak_6.png").is_file()


@pytest.mark.slow
def test_the_report_of_four_ranks(worlds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(worlds, 4)
    found = report(worlds, capsys)
    assert [point.ranks for point in found.points] == [1, 2, 4]
    check(found.points[2], worlds / "runs" / "4")
    assert found.points[2].waiting_share is not None and 0 <= found.points[2].waiting_share <= 1
