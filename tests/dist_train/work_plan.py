"""What ranks do for the planner's tests: real steps, measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from dist_train.batch import Batch
from dist_train.build import build_collator, build_model, build_training, fit_to_dataset, open_split, prepare_tokenizer
from dist_train.plan_model import Clip
from dist_train.recipe import Recipe
from dist_train.step import Stepper
from sharding.agreement import Agreement
from sharding.census import Census
from sharding.collectives import gather_objects
from sharding.meter import Meter
from sharding.order import EpochPlan
from sharding.stream import stream
from tests import tiny

STEPS = 3  # the last is measured: ZeRO-3 first learns the order of modules


def clips_of(batch: Batch, answer: int) -> list[Clip]:
    """Lengths of a micro-batch."""
    columns = [
        (batch[f"{name}_mask"].sum(1) * batch[f"{name}_present"]).tolist()  # type: ignore[literal-required]
        for name in ("audio", "text", "vision")
    ]
    return [Clip(audio, text, vision, answer) for audio, text, vision in zip(*columns, strict=True)]


def measure(folder: Path, data: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Some steps of each recipe; of the last: peak and wire on each rank, and what its micro-batches held."""
    torch.set_num_threads(1)
    found = {}
    for name, changes in cases.items():
        recipe = fit_to_dataset(tiny.recipe(Path(data), **changes))
        tokenizer_path = folder / f"tokenizer_{name}"
        if dist.get_rank() == 0:
            prepare_tokenizer(recipe, tokenizer_path)
        dist.barrier()
        found[name] = gather_objects(step_of(recipe, AutoTokenizer.from_pretrained(tokenizer_path)))
    return found


def step_of(recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """Measures a step of this rank."""
    accumulation = recipe.training.accumulation
    left = Meter().now  # by the engines of other recipes
    model = build_model(recipe, tokenizer)
    split = open_split(recipe, "train")
    plan = EpochPlan(len(split), recipe.data.batch, accumulation, dist.get_world_size(), seed=1, epoch=0)
    batches = list(stream(split, plan, dist.get_rank(), build_collator(recipe, tokenizer, model)))[:accumulation]
    for batch in batches:
        batch.pop("set_aside")
    engine = build_training(recipe, model, micro_batch=max(plan.rows(0)[0]), accumulation=accumulation)
    del model
    stepper = Stepper(
        engine,
        recipe.loss,
        exact=recipe.training.accumulated_loss == "exact",
        keys=split.keys,
        seed=0,
        agreement=Agreement(engine.module, 0),
        census=Census(engine.module, steps=STEPS, excused={"": "not looked at here"}),
    )
    for number in range(STEPS):
        again: Any = iter([dict(batch) for batch in batches])
        with Meter() as meter:
            stepper.run(
                partial(next, again),
                plan.rows(0),
                recipe.data.batch,
                step=number,
                epoch=0,
            )
    engine.destroy()
    return {
        "peak": meter.peak - left,
        "wire": dict(meter.wire),
        "clips": [clips_of(batch, recipe.simulation.max_new_tokens) for batch in batches],
    }


def measure_on_gpu(folder: Path, data: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The allocator's peak in a step of one recipe, and what its micro-batches held."""
    recipe = fit_to_dataset(tiny.recipe(Path(data), **changes))
    prepare_tokenizer(recipe, folder / "tokenizer")
    torch.cuda.reset_peak_memory_stats()
    found = step_of(recipe, AutoTokenizer.from_pretrained(folder / "tokenizer"))
    return {"peak": torch.cuda.max_memory_allocated(), "clips": found["clips"]}
