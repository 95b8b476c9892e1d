"""What the ranks of the tests of extraction do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.build import build_collator, build_model, fit_to_dataset, open_split
from dist_train.costs import clip_costs
from dist_train.evaluate import Predictions, find_checkpoint, load_trained, predict
from dist_train.llm import load_tokenizer
from dist_train.model import DoubleFlow
from dist_train.recipe import Recipe, load_recipe, validate
from dist_train.run_directory import RunDirectory
from tests import tiny


def offline(features: Path, joint: Recipe, **changes: Any) -> Recipe:
    """The recipe whose fusion network is the joint one's, over features."""
    values = joint.model_dump(mode="json", include={"seed", "precision", "fusion", "imagination", "optimizer", "zero"})
    values |= {name: {"input": "features"} for name in ("audio", "text")}
    values |= {"simulation": {"rollout": "features"}, "training": {"epochs": 1}, "schedule": {"name": "paper"}}
    values["data"] = {"path": str(features), "batch": 6, "workers": 0, "evaluation_batch": 7}
    return validate(tiny.merge(values, changes))


def says(model: Any, collate: Any, recipe: Recipe, split: str) -> Predictions:
    """Predictions of both flows."""
    opened = open_split(recipe, split)
    batch = recipe.data.evaluation_batch
    return predict(model.eval(), opened, collate, batch=batch, workers=0, costs=clip_costs(recipe, opened))


def compared(folder: Path, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """For each case {"joint": recipe or run, "features": directory}: the spread of the joint predictions, and the
    largest difference of those of a model without WavLM and language model that has the same fusion network.
    """
    found: dict[str, Any] = {}
    for name, case in cases.items():
        place = Path(case["joint"])
        if place.is_dir():
            run = RunDirectory(place)
            joint = load_recipe(run.recipe)
            whole, hear = load_trained(run, joint, find_checkpoint(run, "best"))
        else:
            joint = fit_to_dataset(load_recipe(place))
            tokenizer = load_tokenizer(str(joint.text.pretrained))
            whole = build_model(joint, tokenizer)
            with torch.no_grad():
                for parameter in whole.fusion.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(1.5)  # much more, and the gates multiply rounding too
                whole.fusion.head.weight.mul_(100)  # predictions of the size of labels
            hear = build_collator(joint, tokenizer, whole)
        alone = fit_to_dataset(offline(Path(case["features"]), joint))
        model: DoubleFlow = build_model(alone, None)
        assert {key.split(".")[0] for key in model.state_dict()} == {"fusion"} and model.llm is None
        model.fusion.load_state_dict(whole.fusion.state_dict())
        read = build_collator(alone, None, model)
        largest, said = 0.0, []
        for split in ("train", "valid", "test"):
            heard, again = says(whole, hear, joint, split), says(model, read, alone, split)
            assert heard.keys == again.keys and np.array_equal(heard.label, again.label)
            assert np.array_equal(heard.present, again.present)
            for flow in ("complete", "missing"):
                a, b = getattr(heard, flow), getattr(again, flow)
                largest = max(largest, float(np.abs(a - b).max()))
                said.append(a)
        found[name] = {"largest": largest, "spread": float(np.concatenate(said).std())}
    return found
