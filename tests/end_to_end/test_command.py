"""The commands as a user types them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from dist_train.plan import Plan
from dist_train.recipe import load_recipe, write_recipe
from tests import tiny

METRICS = {"mae", "corr", "acc2_nonzero", "acc2_has0", "f1_nonzero", "f1_has0", "acc7"}
STEP_KEYS = {
    "kind", "step", "total_steps", "epoch", "samples", "loss", "lr", "grad_norm", "tokens",
    "step_seconds", "data_seconds", "peak_bytes", "clips", "micro_steps", "padding_share", "phases", "flops", "mfu",
    "measured", "exchange_seconds", "between_seconds", "world_size",
    "loss/mse_complete", "loss/mse_missing", "loss/mkd1", "loss/mkd2", "loss/rs", "loss/rnc",
}  # fmt: skip


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "dist_train.cli", *map(str, words)]


def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=240, check=False, **options)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    data = tiny.write_corpus(folder / "shards")
    write_recipe(tiny.recipe(data, data={"workers": 1}, training={"epochs": 2}), folder / "recipe.yaml")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    """A run of 2 ranks through the command line."""
    output = recipe.parent / "run"
    done = run("train", recipe, "--output", output, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout and "floor" in done.stdout and "report.html" in done.stdout
    assert "Traceback" not in done.stderr
    return output


def test_a_run_leaves_what_the_contract_says(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(row.keys() == STEP_KEYS for row in steps)
    assert [row["samples"] for row in steps] == [6, 12, 18, 22, 28, 34, 40, 44]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == [4, 8]
    assert all(row[flow].keys() == METRICS for row in evaluations for flow in ("complete", "missing"))
    summary = json.loads((finished / "summary.json").read_text())
    best = min(evaluations, key=lambda row: row["complete"]["mae"] + row["missing"]["mae"])
    assert summary["best_step"] == best["step"] and summary["selected_on"] == "valid" and summary["world_size"] == 2
    # The best checkpoint, loaded anew into a plain model, says what the engine said during training.
    assert summary["valid"]["complete"]["mae"] == pytest.approx(best["complete"]["mae"], abs=1e-5)
    assert {"clips_per_second", "tokens_per_second", "data_share", "rollout_share"} <= summary["speed"].keys()
    parameters = json.loads((finished / "parameters.json").read_text())
    assert (
        parameters["parameters"]
        >= parameters["trainable"]
        == sum(row["count"] for row in parameters["rows"] if row["trainable"])
    )
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"] and "train" in environment["command"]
    assert "<img" in (finished / "report.html").read_text() and list((finished / "figures").glob("*.png"))
    assert (finished / "checkpoints/best").resolve().name == f"step_{best['step']:08d}"


def test_predictions_are_the_ones_that_were_scored(finished: Path, recipe: Path) -> None:
    with (finished / "predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = {}
    for sample in wds.WebDataset(str(recipe.parent / "shards/test-000000.tar"), shardshuffle=False):
        labels[sample["__key__"]] = json.loads(sample["json"])["label"]
    assert {row["key"]: float(row["label"]) for row in rows} == pytest.approx(labels, abs=1e-5)
    summary = json.loads((finished / "summary.json").read_text())["test"]
    for flow in ("complete", "missing"):
        mae = np.mean([abs(float(row[flow]) - float(row["label"])) for row in rows])
        assert summary[flow]["mae"] == pytest.approx(mae, abs=1e-5)
    assert [row["has_text"] for row in rows if row["key"] in ("test000", "test001")] == ["0", "0"]


def test_the_resolved_recipe_runs_again_as_it_is(finished: Path, recipe: Path) -> None:
    written = load_recipe(finished / "recipe.yaml")
    assert written.widths.vision == tiny.VISION_WIDTH
    assert written.model_copy(update={"widths": load_recipe(recipe).widths}) == load_recipe(recipe)
    again = recipe.parent / "again"
    done = run("train", finished / "recipe.yaml", "--output", again, "--ranks", "2")
    assert done.returncode == 0, done.stderr

    def losses(path: Path) -> list[float]:
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if row["kind"] == "step"]

    assert losses(again) == losses(finished)


def test_evaluate_on_other_ranks_says_the_same(finished: Path) -> None:
    done = run("evaluate", finished, "--split", "test", "--json", "--ranks", "1")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    summary = json.loads((finished / "summary.json").read_text())
    for flow in ("complete", "missing"):
        assert scores[flow] == pytest.approx(summary["test"][flow], abs=1e-5)


def test_ctrl_c_saves_and_resume_ends_the_run(recipe: Path) -> None:
    output = recipe.parent / "interrupted"
    changes = ["training.epochs=400", "data.workers=2"]
    process = subprocess.Popen(
        command("train", recipe, *changes, "--output", output, "--ranks", "2"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal sends it
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"dist-train train {output / 'recipe.yaml'} --output {output} --ranks 2 --resume" in printed
    assert "Traceback" not in errors
    state = json.loads((output / "checkpoints/last/state.json").read_text())
    steps = state["progress"]["step"]
    assert steps == json.loads(metrics.read_text().splitlines()[-1])["step"] >= 1

    epochs = state["progress"]["epoch"] + 1
    done = run("train", recipe, f"training.epochs={epochs}", "--output", output, "--ranks", "2", "--resume")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 4 * epochs + 1))


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_and_names_itself(stage: int, recipe: Path) -> None:
    output = recipe.parent / f"diverged{stage}"
    changes = ["optimizer.learning_rate=1e30", f"zero.stage={stage}"]
    done = run("train", recipe, *changes, "--output", output, "--ranks", "2")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "step 2" in line and "not finite" in line and "mse_complete" in line and "train0" in line
    assert "Traceback" not in done.stderr
    assert not (output / "summary.json").exists()


def test_help_is_quick() -> None:
    """The target is 0.5 s on a free machine; here only what decides it is tested: nothing heavy is imported."""
    code = "import sys, dist_train.cli; print({'torch', 'transformers', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert "train" in run("--help").stdout


def test_plan_of_a_run_stands_beside_what_it_took(finished: Path) -> None:
    plan = Plan.model_validate_json((finished / "plan.json").read_text())
    measured = plan.measured
    assert measured is not None and measured.step == 3 and plan.predicted.world == 2
    # gloo's thread lets a bucket go only after it has told of its end, on busy cores while the next one is filled: a
    # weak reference to a tensor's storage often outlives all_reduce and the tensor by some milliseconds.
    bucket = 4 * load_recipe(finished / "recipe.yaml").zero.bucket_elements
    surplus = measured.peak_bytes - measured.foretold_peak_bytes
    assert -0.05 * measured.peak_bytes < surplus < max(0.05 * measured.peak_bytes, bucket)
    for collective, size in measured.wire_bytes.items():
        assert measured.foretold_wire_bytes[collective] == pytest.approx(size, rel=0.02, abs=100)
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if row["kind"] == "step"]
    assert all(0 < row["mfu"] < 1 and row["flops"] > 0 for row in steps)
    summary = json.loads((finished / "summary.json").read_text())
    assert measured.mfu == summary["speed"]["mfu"] and measured.step_seconds == summary["speed"]["step_seconds"]
