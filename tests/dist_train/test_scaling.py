"""`report --scaling` on run directories written here: what belongs together, what is counted, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from dist_train.cli import app
from dist_train.scaling import Scaling, Series, measure_scaling
from dist_train.scaling_page import write_scaling
from sharding.errors import UserError, UserErrors

WIRE = {"all_reduce": 2_000_000, "all_gather": 3_000_000}
PHASES = {"data": 0.1, "forward": 0.4, "backward": 0.3, "optimizer": 0.1}


def step(number: int, ranks: int, batch: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; 0.05 s belong to no phase, 0.02 s pass between steps."""
    phases = {name: share * (seconds - 0.05) / 0.9 for name, share in PHASES.items()}
    rates = {"step_seconds": seconds, "exchange_seconds": 0.2 * seconds, "between_seconds": 0.02, "mfu": 0.3}
    kept = {"clips": batch, "tokens": 30 * batch, "micro_steps": 1, "epoch": 0, "world_size": ranks, "phases": phases}
    return {"kind": "step", "step": number, "measured": number == 3, **kept, **rates, **changes}


def write_run(
    path: Path, ranks: int, batch: int, rows: list[dict[str, Any]], *, nodes: int = 1, seed: int = 0, **recipe: Any
) -> Path:
    """A run directory with a plan whose step takes 1 s for each 10 clips of a rank, and 5 MB of exchange."""
    path.mkdir(parents=True)
    settings = {"seed": seed, "data": {"batch": batch, "path": "d"}, "text": {"tuning": "lora"}, **recipe}
    (path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "environment.json").write_text(json.dumps({"world_size": ranks, "gpus": []}))
    plan = {
        "nodes": nodes,
        "per_node": ranks // nodes,
        "hardware": {"name": "a card"},
        "predicted": {"seconds": {"step": batch / ranks / 10, "exchange": batch / ranks / 100}},
        "measured": {"wire_bytes": WIRE, "foretold_wire_bytes": WIRE, "exchange_seconds": 0.4, "transfer_seconds": 0.1},
    }
    (path / "plan.json").write_text(json.dumps(plan))
    return path


def steps(rng: np.random.Generator, ranks: int, batch: int, mean: float, count: int = 43) -> list[dict[str, Any]]:
    """Steps of a run: the first two and the measured one are slow."""
    seconds = np.concatenate([[50, 9, 7], mean * rng.uniform(0.9, 1.1, count - 3)])
    return [step(number + 1, ranks, batch, float(value)) for number, value in enumerate(seconds)]


def sweep(folder: Path, rng: np.random.Generator, batches: dict[int, int], seeds: int = 1) -> Path:
    for ranks, batch in batches.items():
        for seed in range(seeds):
            rows = steps(rng, ranks, batch, 0.2 + batch / ranks / 40)
            write_run(folder / f"point_{ranks}" / f"seed_{seed}", ranks, batch, rows, seed=seed)
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def series(found: Scaling) -> dict[tuple[str, float], list[tuple[int, int]]]:
    def members(one: Series) -> list[tuple[int, int]]:
        return [(found.points[entry.point].ranks, found.points[entry.point].batch) for entry in one.entries]

    return {(one.kind, one.clips): members(one) for one in found.series}


def test_weak_and_strong_are_told_apart(tmp_path: Path, rng: np.random.Generator) -> None:
    sweep(tmp_path / "weak", rng, {1: 24, 2: 48, 4: 96})
    sweep(tmp_path / "strong", rng, {1: 96, 2: 96})
    found = measure_scaling([tmp_path / "weak", tmp_path / "strong"])
    assert series(found) == {
        ("weak", 24): [(1, 24), (2, 48), (4, 96)],
        ("strong", 96): [(1, 96), (2, 96), (4, 96)],
    }
    alone = measure_scaling([tmp_path / "strong" / "point_1"])
    assert not alone.series and any("at least two world sizes" in note for note in alone.notes)


def test_only_whole_steps_after_the_warm_up_count(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = steps(rng, 2, 8, 1.0)
    rows[9] = step(10, 2, 8, 77.0, step_seconds=None)  # damaged
    rows[19]["measured"] = True  # resumed before step 18: its first steps are warm-up again
    rows[29]["world_size"] = 4  # continued on other ranks in between
    write_run(tmp_path / "run", 2, 8, rows, training={"profile_step": 40})
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    found = measure_scaling([tmp_path])
    (point,) = found.points
    counted = [row for row in rows if row["step"] not in (1, 2, 3, 10, 18, 19, 20, 30, 40)]
    assert point.steps == len(counted) == 34 and point.left_out == 9
    seconds = sum(row["step_seconds"] for row in counted)
    assert point.clips_per_second.value == pytest.approx(8 * 34 / seconds)
    assert point.tokens_per_second is not None and point.tokens_per_second.value == pytest.approx(240 * 34 / seconds)
    assert point.step_seconds.value == pytest.approx(seconds / 34) and point.mfu is not None
    assert point.mfu.value == pytest.approx(0.3) and point.exchange_share is not None
    assert point.exchange_share.value == pytest.approx(0.2) and point.waiting_share == pytest.approx(0.75)
    assert point.unnamed_seconds == pytest.approx(0.05) and point.between_seconds == pytest.approx(0.02)
    notes = "\n".join(found.notes)
    assert "1 damaged line" in notes and "1 steps were made on other than 2 ranks" in notes


def test_efficiency_beside_the_plan(tmp_path: Path, rng: np.random.Generator) -> None:
    found = measure_scaling([sweep(tmp_path, rng, {1: 40, 2: 80, 4: 80}, seeds=3)])
    weak = next(one for one in found.series if one.kind == "weak" and one.clips == 40)
    one, two = (found.points[entry.point] for entry in weak.entries)
    expected = two.clips_per_second.value / one.clips_per_second.value / 2
    efficiency = weak.entries[1].efficiency
    assert efficiency.value == pytest.approx(expected) and efficiency.low is not None and efficiency.high is not None
    assert efficiency.low < 1 < efficiency.high  # steps take as long on both
    assert weak.entries[0].efficiency.low is None and weak.entries[0].efficiency.value == 1
    assert weak.entries[1].foretold_efficiency == pytest.approx(1)
    strong = next(one for one in found.series if one.kind == "strong")
    assert [found.points[entry.point].ranks for entry in strong.entries] == [2, 4]
    assert strong.entries[1].efficiency.value == pytest.approx((0.2 + 1) / (0.2 + 0.5) / 2, rel=0.05)
    wires = {point.ranks: point.wire for point in found.points}
    assert wires[4] is not None and wires[4].sent == pytest.approx(2e6 * 2 * 3 / 4 + 3e6 * 3 / 4)
    assert wires[1] is not None and wires[1].sent == 0


def test_nodes_are_points_of_their_own(tmp_path: Path, rng: np.random.Generator) -> None:
    for ranks, nodes in ((1, 1), (2, 1), (2, 2)):
        write_run(tmp_path / f"{ranks}x{nodes}", ranks, 8 * ranks, steps(rng, ranks, 8 * ranks, 1.0), nodes=nodes)
    (tmp_path / "2x1" / "plan.json").write_text("{")
    found = measure_scaling([tmp_path])
    assert [(point.ranks, point.nodes) for point in found.points] == [(1, 1), (2, None), (2, 2)]
    assert any("without plan.json" in note for note in found.notes)


def test_mixed_recipes_and_hardware_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    write_run(tmp_path / "a", 1, 8, steps(rng, 1, 8, 1.0), training={"epochs": 1})
    write_run(tmp_path / "b", 2, 16, steps(rng, 2, 16, 1.0), training={"epochs": 2}, zero={"stage": 3}, seed=1)
    (tmp_path / "b" / "environment.json").write_text(json.dumps({"gpus": ["NVIDIA H100"] * 2}))
    with pytest.raises(UserErrors) as refused:
        measure_scaling([tmp_path / "a", tmp_path / "b"])
    told = str(refused.value)
    assert len(refused.value.errors) == 2 and re.search(r"zero.stage: is None in \S+/a and 3 in \S+/b", told)
    assert re.search(r"no GPU in \S+/a and NVIDIA H100 in \S+/b", told)


def test_without_a_usable_run_each_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserErrors, match="holds no run directory") as refused:
        measure_scaling([tmp_path / "empty", tmp_path / "absent"])
    assert "no such directory" in str(refused.value)
    write_run(tmp_path / "short", 1, 8, steps(rng, 1, 8, 1.0)[:3])
    write_run(tmp_path / "none", 1, 8, [])
    write_run(tmp_path / "torn", 1, 8, steps(rng, 1, 8, 1.0))
    (tmp_path / "torn/recipe.yaml").write_text("data: [")
    with pytest.raises(UserErrors) as refused:
        measure_scaling([tmp_path / name for name in ("short", "none", "torn")])
    assert len(refused.value.errors) == 3 and "after the first 2" in str(refused.value)
    write_run(tmp_path / "good", 1, 8, steps(rng, 1, 8, 1.0))
    notes = measure_scaling([tmp_path / name for name in ("short", "none", "torn", "good")]).notes
    assert sum("is left out" in note for note in notes) == 3


@pytest.mark.parametrize(
    "plan",
    [
        {"nodes": 1e30, "per_node": -1, "measured": {"wire_bytes": WIRE, "foretold_wire_bytes": WIRE}},
        {
            "nodes": 0.25,
            "per_node": 8,
            "hardware": {"name": "\x1b[2J<script>$x"},
            "predicted": {"seconds": {"step": "x"}},
        },
        {"nodes": 1, "per_node": 2, "measured": {"wire_bytes": {"all_reduce": float("inf")}, "transfer_seconds": -1}},
    ],
)
def test_hostile_plans_are_shown_plainly(plan: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    sweep(tmp_path, rng, {1: 8, 2: 16})
    (tmp_path / "point_2/seed_0/plan.json").write_text(json.dumps(plan))
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "scaling.html").symlink_to("victim")
    found, page = write_scaling([tmp_path], None)
    assert len(found.points) == 2 and "<script>" not in page.read_text()
    assert (tmp_path / "victim").read_text() == "precious" and not page.is_symlink()
    shown = CliRunner().invoke(app, ["report", "--scaling", str(tmp_path)])
    assert shown.exit_code == 0 and "\x1b[2J" not in shown.stdout


def test_page_figures_and_json_say_the_same(tmp_path: Path, rng: np.random.Generator) -> None:
    sweep(tmp_path / "runs", rng, {1: 24, 2: 48}, seeds=2)
    command = ["report", "--scaling", str(tmp_path / "runs"), "--output", str(tmp_path / "out" / "here"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = Scaling.model_validate_json(result.stdout)
    place = tmp_path / "out" / "here"
    assert {path.name for path in place.iterdir()} == {"scaling.html", "scaling.json", "scaling_weak_24.png"}
    assert Scaling.model_validate_json((place / "scaling.json").read_text()) == found
    text = (place / "scaling.html").read_text()
    for address in re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text):
        assert address.startswith("data:image/png;base64,")
    assert f"{found.points[0].clips_per_second.value:.3g}" in text and "Note" not in text
    assert any("2 runs are too few" in note for note in found.notes) and "2 runs are too few" in text


def test_options_without_scaling_and_no_common_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    sweep(tmp_path, rng, {1: 8})
    alone = CliRunner().invoke(app, ["report", str(tmp_path / "point_1/seed_0"), "--json"])
    assert isinstance(alone.exception, UserError) and "belong to a comparison" in str(alone.exception)
    refused = CliRunner().invoke(
        app, ["report", "--scaling", str(tmp_path), "--output", str(tmp_path / "point_1/seed_0/plan.json")]
    )
    assert isinstance(refused.exception, UserError) and "cannot be written" in str(refused.exception)
