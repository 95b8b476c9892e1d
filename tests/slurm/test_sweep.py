"""Sweeps: grid files, the pool of one machine, job arrays on a real cluster."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from dist_train.recipe import load_recipe
from dist_train.recipe_file import read_values, write_values
from sharding.errors import UserErrors
from slurm.grid import MOST_POINTS, read_grid
from slurm.local import visible_gpus
from slurm.record import Attempt, LaunchRecord
from slurm.settings import LaunchSettings
from slurm.sweep import SweepRequest, submit_sweep
from slurm.sweep_record import SweepRecord
from slurm.sweep_status import Look
from tests.end_to_end.commands import call, errors, press_ctrl_c, started, wait_until
from tests.slurm.conftest import LabCluster
from tests.slurm.runs import NODES, write_tiny

RECIPES = Path(__file__).parents[2] / "recipes"
REFUSED_BY_RANK = "audio={pretrained: /nowhere/model, config: null}"  # what only a rank finds out


def write_grid(folder: Path, **values: Any) -> Path:
    path = folder / "grid.yaml"
    write_values({"recipe": "recipe.yaml", **values}, path)  # quotes text that looks like a number
    return path


def until(condition: Callable[[], Any], limit: float = 400.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.2)


def attempts(run: Path) -> list[Attempt]:
    return LaunchRecord(run).read_attempts()


def table(sweep: Path) -> dict[str, dict[str, Any]]:
    return {row["point"]: row for row in pq.read_table(sweep / "sweep.parquet").to_pylist()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 20 steps."""
    return write_tiny(tmp_path_factory.mktemp("sweep"), epochs=2)


def random_value() -> Any:
    """What a recipe may hold, and what looks like something else as text."""
    number = random.choice([random.uniform(-1, 1), random.random() * 1e-7, random.randrange(-9, 99)])
    texts = [str(number), "1e-4", "true", "null", "a: b", "a, [b", "naïve", "x y", "0x10", "'", "#"]
    return random.choice([number, True, False, None, [number, "1e-4"], {"k": number}, *texts])


def test_points(tmp_path: Path) -> None:
    """Every point sets exactly what the grid file says, types and all; names are distinct and of use as directories."""
    (tmp_path / "recipe.yaml").write_text("a: {x: 0, y: 0}\nb: {x: 0}\nseed: 0\n")
    # Keys a.x and b.x end alike.
    grid = {key: [random_value() for _ in range(random.randint(1, 3))] for key in ("a.x", "a.y", "b.x")}
    unique = {key: list({repr(value): value for value in values}.values()) for key, values in grid.items()}
    path = write_grid(tmp_path, grid=unique, seeds=[3, 5], overrides=["a.y=99"])
    try:
        _, points = read_grid(path, ["b.x=98"])
    except UserErrors as refused:  # values that differ in letters alone which no name may have
        assert all("name" in error.problem for error in refused.errors)
        return
    expected = [
        {"a.x": x, "a.y": y, "b.x": z, "seed": seed} for x, y, z, seed in itertools.product(*unique.values(), [3, 5])
    ]
    assert len(points) == len(expected) == len({point.name for point in points})
    for point, wanted in zip(points, expected, strict=True):
        values, wrong = read_values(tmp_path / "recipe.yaml", point.overrides)
        found = {"a.x": values["a"]["x"], "a.y": values["a"]["y"], "b.x": values["b"]["x"], "seed": values["seed"]}
        assert not wrong and repr(found) == repr(wanted)
        (tmp_path / point.name).mkdir()


@pytest.mark.parametrize(
    "path", sorted([*RECIPES.glob("sweeps/*.yaml"), *RECIPES.glob("scaling/*.yaml")]), ids=lambda path: path.name
)
def test_shipped_grid_files(path: Path) -> None:
    """Each of their points is a recipe, but for data that has to be made first."""
    recipe, points = read_grid(path)
    assert points and all(load_recipe(recipe, point.overrides) for point in points)


def test_all_mistakes_at_once(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is told once, with the points that have it, and nothing is left."""

    def refused(*words: str, **grid: Any) -> list[str]:
        path = tmp_path / "grid.yaml"
        write_values({"recipe": str(recipe), **grid}, path)
        assert call("sweep", path, "--output", tmp_path / "sweep", "--cluster", "local", *words) == 2
        assert not (tmp_path / "sweep").exists()
        return errors(capsys.readouterr().err)

    points = [
        {"name": "same"}, {"name": "same", "overrides": ["seed=1"]}, {"name": "../out"},
    ]  # fmt: skip
    named = refused(points=points)
    assert len(named) == 2 and "name of 2 points" in named[0] and "../out" in named[1]

    told = refused(
        "optimizer.name=adamx",
        grid={"optimizer.learningrate": [1, 2], "data.batch": [0, 6]},
        points=[{"name": "wide", "nodes": 2}],
    )
    assert len(told) == 4
    for line, words in zip(
        told,
        (
            ("--nodes", "one machine"),
            ("data.batch", "cannot be 0", "(at learningrate=1,batch=0; learningrate=2,batch=0)"),
            ("optimizer.name", 'cannot be "adamx".'),
            ("optimizer.learningrate", "(at ", "and 1 more)"),
        ),
        strict=True,
    ):
        assert all(word in line for word in words), line

    told = refused(points=[{"overrides": ["data.path=/nowhere"]}, {"name": "wide", "ranks": 7}, {"name": "good"}])
    assert len(told) == 2 and "(at path=-nowhere)" in told[0] and "6 clips cannot feed 7 ranks" in told[1]

    assert "no points" in refused()[0]
    assert "not known here" in refused(pointz=[], points=[{"rank": 2}])[0]
    many = refused(grid={f"loss.{key}": list(range(30)) for key in "abcd"})
    assert str(30**4) in many[0] and str(MOST_POINTS) in many[0]
    assert "seed" in refused(grid={"seed": [1]}, seeds=[1, 2])[0]
    assert "has no values" in refused(grid={"data.batch": []})[0]


def test_gpus_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number or by name, in the order in which they are named."""
    listing = "".join(f"GPU {n}: NVIDIA H100 80GB HBM3 (UUID: GPU-{name}-1f2e)\n" for n, name in enumerate("abc"))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{listing}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == [0, 1, 2]
    for named, found in {"2,0": [2, 0], "GPU-b-1f2e, 0": [1, 0], "": [], "7": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert visible_gpus() == found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pool(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C leaves the points running; a stopped sweep goes on; one point fails, the others do not mind; what has
    finished is never run again.
    """
    points: list[dict[str, Any]] = [
        {"name": "long", "overrides": ["training.epochs=12"]},
        {"name": "bad", "overrides": [REFUSED_BY_RANK]},
        {"name": "wide", "ranks": 2, "overrides": ["training.epochs=1"]},
    ]
    grid, sweep = write_grid(recipe.parent, points=points), tmp_path / "sweep"
    words = ("sweep", grid, "--output", sweep, "--cluster", "local", "--gpus-per-node", "0", "--parallel", "1")
    record = SweepRecord(sweep)
    with started(*words) as process:
        wait_until((sweep / "long/checkpoints/last").exists, process)
        press_ctrl_c(process, [130])
    pool = record.read_pool()
    assert pool is not None and pool.lives and attempts(sweep / "long")[0].outcome is None
    assert [one.state for one in Look(record)()] == ["running", "waiting", "waiting"]
    assert call(*words, "--resume") == 2 and "at work already" in capsys.readouterr().err

    os.kill(int(pool.process), signal.SIGTERM)
    psutil.Process(int(pool.process)).wait(120)
    stopped = attempts(sweep / "long")[0]
    assert stopped.outcome == "stopped" and stopped.last_step is not None and 0 < stopped.last_step < 120
    assert [one.state for one in Look(record)()] == ["stopped", "not started", "not started"]

    assert call(*words[:-1], "3", "--resume") == 1  # bad does not finish
    printed = capsys.readouterr().out
    assert "/nowhere/model" in printed
    assert "1 failed" in printed and "2 finished" in printed
    assert attempts(sweep / "long")[-1].first_step == stopped.last_step
    rows = table(sweep)
    assert [(row["state"], row["world_size"], row["steps"]) for row in rows.values()] == [
        ("finished", 1, 120), ("failed", 1, None), ("finished", 2, 10)
    ]  # fmt: skip
    assert "/nowhere/model" in rows["bad"]["reason"] and rows["bad"]["test.complete.mae"] is None
    summary = json.loads((sweep / "wide/summary.json").read_text())
    for part in ("complete", "missing", "gap", "floor"):
        assert rows["wide"][f"test.{part}.mae"] == summary["test"][part]["mae"]
    assert rows["long"]["training.epochs"] == 12 and rows["long"]["restarts"] == 1
    assert (sweep / "sweep.png").stat().st_size > 5000 and "wide" in (sweep / "sweep.html").read_text()

    points[1]["overrides"] = ["training.epochs=1"]
    write_grid(recipe.parent, points=points)
    before = {name: len(attempts(sweep / name)) for name in ("long", "wide")}
    assert call(*words, "--resume") == 0
    assert {name: len(attempts(sweep / name)) for name in before} == before
    assert {row["state"] for row in table(sweep).values()} == {"finished"}

    points[0]["overrides"] = ["training.epochs=12", "fusion.dropout=0.9"]
    write_grid(recipe.parent, points=points)
    assert call(*words, "--resume") == 2  # another training under the name of one that has finished
    assert "fusion.dropout" in capsys.readouterr().err
    assert call("status", sweep) == 2 and f"dist-train sweep --status {sweep}" in capsys.readouterr().err


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_array(recipe: Path, idle_cluster: LabCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An element is requeued alone, even the one that bears the array's own job id; one fails alone; logs and state lie
    with each point; the code is that of the submission.
    """
    points: list[dict[str, Any]] = [
        {"name": "bad", "overrides": [REFUSED_BY_RANK]},
        {"name": "short", "overrides": ["training.epochs=1"]},
        {"name": "small", "overrides": ["training.epochs=1", "data.batch=12"]},
        {"name": "last"},
    ]
    grid, sweep = write_grid(recipe.parent, points=points), tmp_path / "sweep"
    settings = LaunchSettings.model_validate({**NODES, "nodes": "1"})
    said: list[str] = []
    monkeypatch.chdir(Path(__file__).parents[2])  # a checkout, whose code jobs must not take
    record = submit_sweep(SweepRequest(grid, [], sweep, settings), said.append)
    assert record is not None
    (record.path / "1/code/REVISION").write_text("as submitted")  # read by ranks, seconds later
    jobs = [LaunchRecord(sweep / point["name"]).read_submissions()[0].job for point in points]
    assert [job.partition("_")[2] for job in jobs] == ["0", "1", "2", "3"] and len({job[:-2] for job in jobs}) == 1

    last = sweep / "last"
    until(lambda: (last / "metrics.jsonl").exists() and (last / "metrics.jsonl").read_text())
    shown = idle_cluster.slurm("scontrol", "show", "job", jobs[3])
    assert f"JobId={jobs[3].partition('_')[0]} " in shown
    idle_cluster.slurm("scancel", "--signal=USR2", jobs[3])
    look = Look(record)
    until(lambda: all(one.over for one in look()))

    kinds = [[attempt.outcome for attempt in attempts(sweep / point["name"])] for point in points]
    assert kinds == [["refused"], ["finished"], ["finished"], ["stopped", "finished"]]
    first, second = attempts(last)
    assert 0 < second.first_step == first.last_step and second.last_step == 20
    for point, job in zip(points, jobs, strict=True):
        log = LaunchRecord(sweep / point["name"]).log(job, 0, "err")
        assert log is not None and f"attempt 0 of job {job} on" in log.read_text()
    assert json.loads((last / "environment.json").read_text())["git"] == "as submitted"

    assert call("sweep", "--status", sweep) == 0
    rows = table(sweep)
    assert [row["state"] for row in rows.values()] == ["failed", "finished", "finished", "finished"]
    assert rows["last"]["restarts"] == 1 and rows["small"]["data.batch"] == 12 and rows["short"]["data.batch"] == 6

    submit_sweep(SweepRequest(grid, [], sweep, settings, resume=True), said.append)
    assert [len(LaunchRecord(sweep / point["name"]).read_submissions()) for point in points] == [2, 1, 1, 1]
    assert "Finished already: 3 of 4 points." in said
    again = LaunchRecord(sweep / "bad").read_submissions()[-1].job
    idle_cluster.slurm("scancel", again)
    assert again.isdecimal() and (record.path / "2/array_1/0").exists()
