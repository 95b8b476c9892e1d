"""What the ranks of the tests of the systems beside SDUMC do: train each of them under several ZeRO stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.build import fit_to_dataset
from dist_train.progress import Display
from sharding.errors import UserErrors
from sharding.signals import StopFlag
from tests import tiny
from tests.work import StopAfter, fit, new_run

SYSTEMS: dict[str, dict[str, Any]] = {
    "random": {"missing": "random"},
    "audio": {"missing": "audio", "simulation": {"rollout": "none"}},
    "cmpt": {
        "imagination": {"kind": "cmpt", "heads": 2},
        "missing": "random",
        "simulation": {"rollout": "none"},
        "audio": {"tuning": "lora", "lora": {"rank": 1, "alpha": 1}},
    },
    "promma": {
        "imagination": {"kind": "promma", "prompts": 2, "heads": 2},
        "simulation": {"rollout": "generate"},
    },
    "vgmr": {"refine": {"kind": "vgmr", "width": 8}, "missing": "random"},
}


def stages(folder: Path, data: str, system: str) -> dict[str, list[float]]:
    """Losses of the steps under each ZeRO stage."""
    found: dict[str, list[float]] = {}
    for stage in (0, 2, 3):
        recipe = tiny.recipe(
            Path(data),
            **{
                "data": {"batch": 24},
                "zero": {"stage": stage},
                "optimizer": {"learning_rate": 2e-3},
                "training": {"epochs": 4, "check_agreement_steps": 2},
                **SYSTEMS[system],
            },
        )
        recipe = fit_to_dataset(recipe)
        steps = fit(recipe, new_run(recipe, folder / f"{system}{stage}"))
        found[str(stage)] = [step["loss"] for step in steps]
    return found


def died(folder: Path, data: str) -> dict[str, str]:
    """How a run ends in which a part learns nothing, from its start and from where it was resumed."""
    recipe = tiny.recipe(Path(data), data={"batch": 12}, training={"epochs": 2})
    recipe = fit_to_dataset(recipe)
    run = new_run(recipe, folder / "resumed")
    fit(recipe, run, last=2)
    ends = {}
    for name, place in (("resumed", run), ("fresh", new_run(recipe, folder / "fresh"))):
        trainer = StopAfter(recipe, place, resume=name == "resumed")
        trainer.last = None
        trainer.engine.module.fusion.rnc_head.register_forward_hook(lambda *args: 0 * args[2])
        try:
            with StopFlag() as stop, Display(1, 0, quiet=True) as display:
                trainer.fit(display, stop)
            ends[name] = f"finished at step {trainer.progress.step}"
        except UserErrors as error:
            ends[name] = str(error)
    return ends
