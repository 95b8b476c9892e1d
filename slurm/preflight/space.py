"""Whether there is room: on the disk for the run's checkpoints, in /dev/shm for its data workers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from dist_train.build import fit_to_dataset
from dist_train.plan_model import build_hollow
from dist_train.plan_pretrained import tokenizer_of, without_weights
from dist_train.plan_table import size
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from sharding.retention import completed
from sharding.shards import load_info
from slurm.preflight.findings import Finding, findings_of, first_ranks, severity_of

CHECK = "space"
SHARED = Path("/dev/shm")
COPIES = 3  # of each trainable in a checkpoint: master and two moments
FP32 = 4
BATCHES_AHEAD = 2  # of a data worker: DataLoader's prefetch_factor
DECODED = 2  # bytes of a waveform in memory per byte of a 16-bit file


class Disk(BaseModel):
    """Where checkpoints go, as rank 0 sees it. Bytes."""

    place: str
    free: int
    checkpoint: int = Field(description="Of one checkpoint.")
    kept: int = Field(description="Checkpoints that the run will hold at once besides those there, at least two.")
    for_good: int = Field(description="Checkpoints that checkpoint.keep_every adds until the last epoch.")


def disk_for(recipe: Recipe, run: RunDirectory) -> Disk:
    """Foretells what checkpoints take, beside what the disk has.

    Raises:
        UserError: a pretrained model's configuration or the dataset cannot be had.
    """
    recipe = fit_to_dataset(recipe)
    planned, _ = without_weights(recipe)
    with torch.random.fork_rng(devices=[]):  # building sets the seed
        model = build_hollow(planned, tokenizer_of(recipe))
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    settings = recipe.checkpoint
    place = existing(run.checkpoints)
    # Those that are kept, the best one, and the one that is written before the oldest goes.
    kept = settings.keep_last + 2 - len(completed(run.checkpoints))
    steps = recipe.training.epochs * -(-sum(split["samples"] for split in training_splits(recipe)) // recipe.data.batch)
    return Disk(
        place=str(place),
        free=shutil.disk_usage(place).free,
        checkpoint=trained * COPIES * FP32,
        kept=max(kept, 2),
        for_good=steps // settings.keep_every if settings.keep_every is not None else 0,
    )


def training_splits(recipe: Recipe) -> list[dict[str, int]]:
    """Samples and bytes of the recipe's training splits."""
    data = recipe.data
    roots = [data.path] if data.path is not None else [source.path for source in data.sources or ()]
    splits = [load_info(Path(root)).splits.get("train") for root in roots]
    return [
        {"samples": split.samples, "bytes": sum(entry.bytes for entry in split.shards)}
        for split in splits
        if split is not None
    ]


def worker_bytes(recipe: Recipe, world: int) -> int:
    """Bytes of /dev/shm that the data workers of one rank fill with typical batches, padding aside.

    Raises:
        UserError: the dataset cannot be opened.
    """
    splits = training_splits(recipe)
    samples, held = (sum(split[name] for split in splits) for name in ("samples", "bytes"))
    clips = -(-recipe.data.batch // (world * recipe.training.accumulation))
    return recipe.data.workers * BATCHES_AHEAD * clips * DECODED * held // max(samples, 1)


def free_bytes(path: Path) -> int | None:
    """Free bytes of a file system; None where it is not there."""
    return shutil.disk_usage(path).free if path.is_dir() else None


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def judge_space(
    disk: Disk | None, shared: Mapping[int, int], worker: int | None, nodes: Sequence[str]
) -> Iterator[Finding]:
    """Findings about room.

    Args:
        disk: what rank 0 foretold; None: it could not.
        shared: free bytes of /dev/shm, by rank.
        worker: see `worker_bytes`; None: it could not be foretold.
        nodes: name of the node of each rank.
    """
    if disk is not None:
        sizes = f"a checkpoint takes {size(disk.checkpoint)}, {disk.place} has {size(disk.free)} free"
        if disk.free < disk.kept * disk.checkpoint:
            problem = f"{sizes}, and {disk.kept} will be held at once (checkpoint.keep_last, the best, one in writing)"
            yield Finding(nodes[0], None, CHECK, f"{problem}. Free space, or give another --output.", "stop")
        elif disk.free < (disk.kept + disk.for_good) * disk.checkpoint:
            problem = f"{sizes}, and checkpoint.keep_every may keep {disk.for_good} for good"
            yield Finding(nodes[0], None, CHECK, f"{problem}. Free space, or raise checkpoint.keep_every.", "note")
    if worker is not None:
        ranks = Counter(nodes)
        small = {
            rank: f"/dev/shm has {size(shared[rank])} free, the data workers of {ranks[node]} ranks fill "
            f"{size(worker * ranks[node])}"
            for node, rank in first_ranks(nodes).items()
            if rank in shared and shared[rank] < worker * ranks[node]
        }
        remedy = "Enlarge it (--shm-size of a container), or write data.workers: 0."
        yield from findings_of(nodes, CHECK, small, remedy, severity_of({nodes[rank] for rank in small}, nodes))
