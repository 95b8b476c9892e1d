"""One rank's entry: joins its world, lets rank 0 prepare for all, and does the work."""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist
import transformers
from rich.console import Console

from dist_train.build import fit_to_dataset, open_splits, prepare_tokenizer
from dist_train.evaluate import evaluate_checkpoint, find_checkpoint
from dist_train.notes import column
from dist_train.recipe import Recipe, load_recipe, write_recipe
from dist_train.resume import check_same, continue_from
from dist_train.robustness import evaluate_robustness
from dist_train.run_directory import RunDirectory
from dist_train.tables import robustness_table, scores_table
from dist_train.train import train
from dist_train.world_size import check_world_size
from sharding import world as worlds
from sharding.collectives import together
from sharding.errors import UserError
from sharding.launch import INTERRUPTED, launched
from sharding.signals import StopFlag
from sharding.watchdog import Watchdog

# Of torch's own calls inside transformers' WavLM and DeepSpeed; nothing a user could change.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")


def run_training(
    world: worlds.World,
    recipe_path: Path,
    overrides: Sequence[str],
    run: RunDirectory,
    *,
    fresh: bool,
    resume: bool,
    accept_other_base: bool,
    stop: StopFlag | None = None,
    examine: Callable[[Recipe], None] | None = None,
) -> int:
    """`dist-train train` in this rank. Returns the exit code.

    Args:
        fresh: the run directory has still to be made (nobody launched this rank who made it).
        accept_other_base: continue on other frozen weights than those trained on so far.
        stop: raised when to stop and save; None: by signals.
        examine: called on all ranks before anything is loaded.

    Raises:
        UserError, UserErrors: the same on all ranks for a wrong recipe, or on one rank for a bad sample.
    """
    console = Console(quiet=world.rank != 0)
    if world.rank != 0:
        transformers.utils.logging.disable_progress_bar()
    worlds.join(world, with_deepspeed=True)
    together(lambda: prepare(recipe_path, overrides, run, fresh=fresh, resume=resume) if world.rank == 0 else None)
    settings = load_recipe(run.recipe)
    if examine is not None:
        examine(settings)
    limit = settings.training.watchdog_seconds
    with (
        nullcontext() if limit is None else Watchdog(run.logs, limit) as watchdog,
        StopFlag() if stop is None else nullcontext(stop) as flag,
    ):
        finished = train(
            settings, run, resume=resume, accept_other_base=accept_other_base, watchdog=watchdog, stop=flag
        )
    if world.rank != 0:
        return 0 if finished else INTERRUPTED
    if not finished:
        ranks = ["--ranks", str(world.size)] if launched() else []
        again = shlex.join(["train", str(run.recipe), "--output", str(run.path), *ranks, "--resume"])
        console.print(f"Stopped and saved. Continue with: dist-train {again}", soft_wrap=True)
        return INTERRUPTED
    from dist_train.report import write_report  # noqa: PLC0415  draws; only rank 0 needs it

    summary = json.loads(run.summary.read_text())
    split = "test" if "test" in summary else "valid"
    console.print(
        scores_table(
            summary[split],
            f"{split} split, best checkpoint on {summary['selected_on']} (step {summary['best_step']})",
            settings.missing,
            settings.task.kind,
        )
    )
    for note in summary["notes"]:
        console.print(f"Note: {note}")
    console.print(f"Report: {write_report(run.path)}")
    return 0


def run_evaluation(
    world: worlds.World,
    run: RunDirectory,
    checkpoint: str,
    split: str,
    *,
    as_json: bool,
    accept_other_base: bool,
    robustness: bool,
    text_from: str | None,
) -> int:
    """`dist-train evaluate` in this rank. Returns the exit code.

    Args:
        robustness: with missing and noisy modalities instead.
        text_from: field of KEY.json that is read in the place of the transcript.
    """
    worlds.join(world, with_deepspeed=False)
    run.open()
    place = find_checkpoint(run, checkpoint)
    recipe = load_recipe(run.recipe)
    if robustness:
        found = evaluate_robustness(run, recipe, place, split, accept_other_base=accept_other_base)
        if world.rank == 0 and as_json:
            print(found.model_dump_json(indent=1))
        elif world.rank == 0:
            Console().print(robustness_table(found))
            place = run.path / f"robustness_{split}.json"
            Console().print(f"All of it: {place}; figures: dist-train report {run.path}", soft_wrap=True)
        return 0
    scores = evaluate_checkpoint(run, recipe, place, split, accept_other_base=accept_other_base, text_from=text_from)
    if world.rank == 0:
        text = "" if text_from is None else f", text from {text_from}"
        if as_json:
            print(json.dumps({"split": split, **scores}, indent=1))
        else:
            title = f"{split} split: {scores['clips']} clips{text}"
            Console().print(scores_table(scores, title, recipe.missing, recipe.task.kind))
    return 0


def prepare(recipe_path: Path, overrides: Sequence[str], run: RunDirectory, *, fresh: bool, resume: bool) -> None:
    """What one rank does for all: checks the recipe against data and world, and fills the run directory.

    Raises:
        UserError, UserErrors: what is wrong, before anything costly starts.
    """
    recipe = fit_to_dataset(load_recipe(recipe_path, overrides))
    check_size(recipe)
    if resume:
        run.open()
    if resume and run.saved:
        check_same(load_recipe(run.recipe), recipe)
        continue_from(run, recipe)
    else:
        if resume:
            Console().print(f"Nothing was saved yet in {run.path}: training starts at step 0.")
            run.restart()
        if fresh:
            run.create()
        prepare_tokenizer(recipe, run.tokenizer)
        run.write_environment(dist.get_world_size())
    write_recipe(recipe, run.recipe)


def check_size(recipe: Recipe) -> None:
    """Refuses data that cannot feed every rank, without a validation split, or with labels that no task has.

    Raises:
        UserError, UserErrors: see `check_world_size` and `open_splits`.
    """
    splits = open_splits(recipe)
    clips, valid = len(splits["train"]), splits["valid"]
    if recipe.training.select_on == "transcription":
        spoken = zip(column(recipe, valid, "audio"), column(recipe, valid, "text"), strict=True)
        if not any(audio is not None and text is not None for audio, text in spoken):
            raise UserError(
                "training.select_on",
                "is transcription, but no validation clip has both audio and transcript",
                "Add such clips to the valid split.",
            )
    check_world_size(
        recipe.data.path,
        clips,
        dist.get_world_size(),
        batch=recipe.data.batch,
        accumulation=recipe.training.accumulation,
    )


def end(code: int) -> None:
    """Leaves the world and ends at once: interpreter shutdown after gloo now and then aborts although all work is
    done.
    """
    worlds.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
