"""What the ranks of test_step do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_train.build import fit_to_dataset
from tests import tiny
from tests.work import fit, new_run

RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "three": {"training": {"accumulation": 3}},
    "budget": {"data": {"budget": {"audio_seconds": 1.7}}},
}


def accumulated(folder: Path, data: str, stage: int) -> dict[str, Any]:
    """Losses and micro-steps of runs that differ in how a step is cut."""
    losses, micro_steps = {}, {}
    for name, changes in RUNS.items():
        values = tiny.merge({"data": {"batch": 16}, "zero": {"stage": stage}}, changes)
        recipe = fit_to_dataset(tiny.recipe(Path(data), **values))
        run = new_run(recipe, folder / name)
        losses[name] = fit(recipe, run)
        rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        micro_steps[name] = [row["micro_steps"] for row in rows if row["kind"] == "step"]
    return {"losses": losses, "micro_steps": micro_steps}
