"""What the ranks of distributed tests do. Each function runs in every rank; rank 0's return value goes to the test."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from dist_train.build import build_collator, build_model, fit_to_dataset, open_split, prepare_tokenizer, to_device
from dist_train.global_loss import global_loss, pack
from dist_train.progress import Display
from dist_train.recipe import Recipe, write_recipe
from dist_train.run_directory import RunDirectory
from dist_train.step import StepResult
from dist_train.train import Trainer
from sharding.collectives import device
from sharding.order import EpochPlan
from sharding.signals import StopFlag
from sharding.stream import stream
from tests import tiny


def new_run(recipe: Recipe, path: Path) -> RunDirectory:
    """A run directory as rank 0 prepares it."""
    run = RunDirectory(path)
    if dist.get_rank() == 0:
        run.create()
        write_recipe(recipe, run.recipe)
        prepare_tokenizer(recipe, run.tokenizer)
        run.write_environment(dist.get_world_size())
    dist.barrier()
    return run


def losses(run: RunDirectory) -> list[dict[str, Any]]:
    """Step, losses and gradient norm of the step lines of metrics.jsonl."""
    dist.barrier()
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    names = [name for name in rows[0] if name.startswith("loss") or name in ("step", "grad_norm")]
    return [{name: row[name] for name in names} for row in rows if row["kind"] == "step"]


class StopAfter(Trainer):
    """A trainer whose last rank gets a signal in step `last`."""

    last: int | None = None

    def step(self, next_batch: Callable[[], Any], plan: EpochPlan, epoch_step: int, rate: float) -> StepResult:
        if self.progress.step + 1 == self.last and self.rank == self.world - 1:
            signal.raise_signal(signal.SIGUSR2)
        return super().step(next_batch, plan, epoch_step, rate)


def fit(recipe: Recipe, run: RunDirectory, *, resume: bool = False, last: int | None = None) -> list[dict[str, Any]]:
    """Trains (until step `last`) and returns the step lines."""
    trainer = StopAfter(recipe, run, resume=resume)
    trainer.last = last
    with StopFlag() as stop, Display(1, 0, quiet=True) as display:
        assert trainer.fit(display, stop) == (last is not None)
    return losses(run)


def stages(folder: Path, data: str, precision: str, numbers: list[int], accumulation: int) -> dict[str, Any]:
    """The same run under several ZeRO stages."""
    found = {}
    for stage in numbers:
        recipe = tiny.recipe(
            Path(data), precision=precision, zero={"stage": stage}, training={"accumulation": accumulation, "epochs": 1}
        )
        recipe = fit_to_dataset(recipe)
        found[str(stage)] = fit(recipe, new_run(recipe, folder / f"stage{stage}"))
    return found


def resumed(folder: Path, data: str, precision: str, stage: int) -> dict[str, Any]:
    """A run stopped in the middle of an epoch and continued, beside an undisturbed one; dropout is on."""
    recipe = tiny.recipe(
        Path(data), precision=precision, zero={"stage": stage}, training={"epochs": 2}, fusion={"dropout": 0.2}
    )
    recipe = fit_to_dataset(recipe)
    whole = fit(recipe, new_run(recipe, folder / "whole"))
    run = new_run(recipe, folder / "parts")
    first = fit(recipe, run, last=3)
    return {"whole": whole, "first": first, "parts": fit(recipe, run, resume=True)}


def gradients(folder: Path, data: str, batch: int, rollout: str) -> dict[str, Any]:
    """Loss and gradients of every global batch of an epoch, averaged over ranks as data parallelism does."""
    recipe = tiny.recipe(Path(data), data={"batch": batch}, simulation={"rollout": rollout})
    recipe = fit_to_dataset(recipe)
    run = RunDirectory(folder / "gradients")
    if dist.get_rank() == 0:
        shutil.rmtree(run.path, ignore_errors=True)
        run.path.mkdir()
        prepare_tokenizer(recipe, run.tokenizer)
    dist.barrier()
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    model = build_model(recipe, tokenizer).to(device())
    split = open_split(recipe, "train")
    plan = EpochPlan(len(split), batch, 1, dist.get_world_size(), seed=1, epoch=0)
    losses, saved = [], {}
    for step, collated in enumerate(stream(split, plan, dist.get_rank(), build_collator(recipe, tokenizer, model))):
        model.zero_grad()
        collated.pop("set_aside")
        here = to_device(collated, device())
        packed = pack(model(here), here)
        result = global_loss([packed], recipe.loss)
        result.surrogate(0, packed).backward()
        terms = {name: term.item() for name, term in result.terms.items()}
        losses.append({"clips": result.clips, "loss": result.loss.item(), **terms})
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} has no gradient"
                dist.all_reduce(parameter.grad)
                saved[f"{step}.{name}"] = parameter.grad / dist.get_world_size()
    if dist.get_rank() == 0:
        torch.save(saved, folder / "gradients.pt")
    return {"losses": losses}
