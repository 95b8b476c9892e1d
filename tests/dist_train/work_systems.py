"""What the ranks of the tests of the systems beside SDUMC do: train each of them under several ZeRO stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.build import fit_to_dataset
from tests import tiny
from tests.work import fit, new_run

SYSTEMS: dict[str, dict[str, Any]] = {
    "random": {"missing": "random"},
    "audio": {"missing": "audio", "simulation": {"rollout": "none"}},
    "vgmr": {"refine": {"kind": "vgmr", "width": 8}, "missing": "random"},
}


def systems(folder: Path, data: str) -> dict[str, dict[str, list[float]]]:
    """Losses of the steps of each system and stage."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, changes in SYSTEMS.items():
        for stage in (0, 2, 3):
            recipe = tiny.recipe(
                Path(data),
                **{
                    "data": {"batch": 24},
                    "zero": {"stage": stage},
                    "optimizer": {"learning_rate": 2e-3},
                    "training": {"epochs": 4, "check_agreement_steps": 2},
                    **changes,
                },
            )
            recipe = fit_to_dataset(recipe)
            steps = fit(recipe, new_run(recipe, folder / f"{name}{stage}"))
            found.setdefault(name, {})[str(stage)] = [step["loss"] for step in steps]
    return found
