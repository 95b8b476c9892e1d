"""What the ranks of the tests of the compatibility rules do: a few steps of the double flow under each case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dist_train.build import build_collator, build_model, build_training
from dist_train.global_loss import global_loss, pack
from dist_train.recipe import Recipe
from dist_train.tokenizer import train_tokenizer
from sharding.census import Census
from sharding.collectives import gather_objects
from sharding.engine_state import master
from tests import tiny

STEPS = 3
# VeRA's scales take larger ones, and the first gradients of lambda_d, which go through the lambda_b
# that starts at 0, are lost in float16 (int8) else.
LEARNING_RATE = {False: 3e-4, True: 3e-3}
# bitsandbytes computes nf4 on a CPU only for multiples of 64.
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}


def recipe_of(case: dict[str, Any]) -> Recipe:
    """A tiny recipe with both parts as the case says; not validated as a whole, since some cases are refused."""
    part = {key: case[key] for key in ("tuning", "quantisation", "activation_checkpointing")}
    values = tiny.recipe(Path("none"), widths={"vision": tiny.VISION_WIDTH}).model_dump()
    changes = {
        "precision": case["precision"],
        "audio": {"config": {**SMALL, "conv_dim": [64] * 7}, **part},
        "text": {"config": SMALL, **part},
        "optimizer": {"name": case["optimizer"], "learning_rate": LEARNING_RATE[case["tuning"] == "vera"]},
        "loss": {"mkd1": 0.0, "mkd2": 0.0},  # their teacher is detached: the sum need not fall
        "zero": {key: case[key] for key in ("stage", "offload_optimizer", "offload_parameters")},
    }
    return Recipe.model_validate(tiny.merge(values, changes))


def trained(case: dict[str, Any], seed: int) -> dict[str, Any]:
    """`train_on_one_batch` under a case."""
    return train_on_one_batch(recipe_of(case).model_copy(update={"seed": seed}), seed)


def train_on_one_batch(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Losses of some steps on one batch per rank, and which trainables have not moved."""
    tokenizer = train_tokenizer([" ".join(tiny.WORDS)] * 3, 320)
    model = build_model(recipe, tokenizer)
    rng = np.random.default_rng([seed, dist.get_rank()])
    clips = [{"key": str(i), "index": i, "real": True, **tiny.clip(rng)} for i in range(3)]
    batch = build_collator(recipe, tokenizer, model)(clips)
    batch.pop("set_aside")  # type: ignore[misc]
    engine = build_training(recipe, model, micro_batch=3)
    learners = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    before = {name: master(engine, parameter).clone() for name, parameter in learners.items()}
    census = Census(engine.module, steps=2)
    engine.train()
    losses = []
    for step in range(STEPS):
        packed = pack(engine(batch), batch)
        result = global_loss([packed], recipe.loss)
        engine.backward(result.surrogate(0, packed))
        census.after_backward(step)
        engine.step()
        losses.append(result.loss.item())
    still = [name for name, parameter in learners.items() if torch.equal(master(engine, parameter), before[name])]
    engine.destroy()
    return {"losses": losses, "still": still}


def cells(folder: Path, seed: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`trained` for each case, or the error it ends in."""
    found = []
    for case in cases:
        try:
            outcome = trained(case, seed)
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"[:300]}
        assert len({str(other) for other in gather_objects(outcome)}) == 1, (case, gather_objects(outcome))
        found.append(outcome)
    return found
