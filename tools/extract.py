"""`dist-train extract`: what frozen models say of every clip, once, into shards (the paper's offline regime).

The clips of a split go by key into tars of equal numbers, so the tars are a function of the data alone. Each rank
makes whole tars; the batches inside one are a function of its clips, so a tar holds the same bytes whoever makes it.
Until all are there they lie in a hidden directory beside OUT; the same command goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from dist_train.batch import Collator
from dist_train.build import build_collator, build_model, open_split, to_device
from dist_train.costs import audio_seconds, clip_costs
from dist_train.evaluate import find_checkpoint, load_trained, same_bases
from dist_train.features import settings_of, tokenizer_fingerprint
from dist_train.llm import load_tokenizer
from dist_train.packed import TextStates
from dist_train.rank import end
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from sharding import world as worlds
from sharding.budget import compose
from sharding.checkpoint import fingerprints
from sharding.collectives import any_rank, device, together
from sharding.errors import UserError
from sharding.launch import INTERRUPTED, launched, run_local
from sharding.ops import choose_accelerator
from sharding.portable import MANIFEST
from sharding.shard_writer import PackedSample, pack_sample
from sharding.shards import SOURCE, Dims, SetAside, Split, load_info
from sharding.signals import StopFlag
from sharding.stream import Rows, Sample, ShardedSplit, load
from tools.extract_directory import Extraction, Piece
from tools.extract_recipe import extractable

DTYPES: dict[str, type[np.floating[Any]]] = {"float16": np.float16, "float32": np.float32}
DAY = 24 * 60  # minutes: a rank may have to wait for the last tar of a slower one
GLANCE = 5.0  # seconds between looks at what other ranks have made


def extract(
    recipe: Path,
    overrides: Sequence[str],
    out: Path,
    command: Sequence[str],
    *,
    ranks: int,
    checkpoint: Path | None,
    dtype: str,
    samples_per_shard: int,
) -> None:
    """Extracts, in the world that this process is in, or in one of `ranks` local processes that run `command`.

    Raises:
        UserError, UserErrors: recipe, models, data or OUT do not allow it; tells what to do.
        SystemExit: of the local ranks.
    """
    if dtype not in DTYPES:
        raise UserError("--dtype", f"is {dtype!r}", f"Write {' or '.join(DTYPES)}.")
    world = worlds.read_world(os.environ)
    place = Extraction(out, samples_per_shard)
    if world is None:
        try:
            raise SystemExit(run_local(command, ranks, place.logs))
        finally:
            place.discard_unstarted()
    choose_accelerator()
    worlds.join(world, with_deepspeed=False, timeout_minutes=DAY)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # sums of several threads round otherwise, and other ranks have other numbers of them
    if world.rank != 0:
        transformers.utils.logging.disable_progress_bar()
    with StopFlag() as stop:
        settings = together(lambda: extractable(recipe, overrides, checkpoint))
        finished = Extractor(settings, place, checkpoint, dtype, stop).run()
    if not finished and world.rank == 0:
        again = "the same command" if launched() else "the same command on any number of ranks"
        print(f"Stopped. What is finished is kept in {place.partial}: {again} goes on.", file=sys.stderr)
    end(0 if finished else INTERRUPTED)


class Extractor:
    """One rank's part.

    Args:
        recipe: resolved; all that it reads is frozen, or in the checkpoint.
        place: where it goes.
        checkpoint: of a run, or its directory.
        dtype: that features are stored in.
        stop: raised when to end.
    """

    def __init__(self, recipe: Recipe, place: Extraction, checkpoint: Path | None, dtype: str, stop: StopFlag) -> None:
        self.recipe, self.place, self.dtype, self.stop = recipe, place, dtype, stop
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        contents = load_info(Path(str(recipe.data.path)))
        self.contents, self.vision = contents, contents.dims.vision
        identity = {**settings_of(recipe), "dtype": dtype, SOURCE: contents.content_hash}
        together(lambda: place.check(identity) if self.rank == 0 else None)  # before anything is loaded
        self.model, self.collate, self.identity = together(lambda: self.load(identity, checkpoint))
        self.splits: dict[Split, ShardedSplit] = together(
            lambda: {name: open_split(recipe, name) for name in contents.splits}
        )
        self.heard = {name: audio_seconds(recipe, split.columns) for name, split in self.splits.items()}
        self.costs = together(lambda: {name: clip_costs(recipe, split) for name, split in self.splits.items()})
        # What is features already is passed on.
        self.passed = {
            "audio": recipe.audio.input == "features",
            "text_features": recipe.text.input == "features",
            "simulated": recipe.simulation.rollout == "features",
        }

    def load(self, identity: dict[str, Any], checkpoint: Path | None) -> tuple[Any, Collator, dict[str, Any]]:
        """The model, its collator, and the identity with the fingerprints of both."""
        recipe = self.recipe
        if checkpoint is None:
            name = recipe.text.tokenizer or recipe.text.pretrained
            tokenizer = load_tokenizer(str(name)) if recipe.reads_language_model else None
            model: nn.Module = build_model(recipe, tokenizer)
            collate = build_collator(recipe, tokenizer, model)  # type: ignore[arg-type]
            trained = None
        else:
            run, directory = run_of(checkpoint)
            model, collate = load_trained(run, recipe, directory)
            tokenizer, trained = collate.tokenizer, hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
        model = model.to(device()).eval().requires_grad_(False)
        weights = {part: value for part, value in fingerprints(model).items() if part != "fusion"}
        words = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        return model, collate, {**identity, "weights": weights, "tokenizer": words, "checkpoint": trained}

    def run(self) -> bool:
        """Makes what is missing; rank 0 then puts it all in its place. Returns whether all is there (collective)."""
        same_bases(self.identity["weights"])
        done = together(lambda: self.place.begin(self.identity) if self.rank == 0 else False)
        if any_rank(bool(done)):
            if self.rank == 0:
                print(f"{self.place.out} holds these features already.")
            return True
        together(self.place.check_shared)
        size = self.place.samples_per_shard
        pieces = [
            Piece(name, number, range(first, min(first + size, len(split))))
            for name, split in self.splits.items()
            for number, first in enumerate(range(0, len(split), size))
        ]
        ready = together(lambda: {piece for piece in pieces if self.place.has(piece)})
        dist.barrier()  # nobody begins before all have looked: else they would deal other pieces
        todo = [piece for piece in pieces if piece not in ready]
        shares = deal(todo, [self.seconds(piece) for piece in todo], self.world)
        with self.bar(pieces, ready) as advance:
            finished = self.make(shares[self.rank], advance)
        if any_rank(not finished):
            return False
        together(lambda: self.finish(pieces) if self.rank == 0 else None)
        return True

    def seconds(self, piece: Piece) -> float:
        """Of audio in it, and something for each clip."""
        return float(self.heard[piece.split][piece.clips.start : piece.clips.stop].sum()) + len(piece.clips)

    def make(self, pieces: Sequence[Piece], advance: Any) -> bool:
        """Makes some tars; returns False if stopped on the way."""
        names = ["key", "index", "label", "text", "vision", *(name for name, passed in self.passed.items() if passed)]
        for split, group in ((name, [p for p in pieces if p.split == name]) for name in self.splits):
            source = self.splits[split]
            plan = [self.batches(piece) for piece in group]
            rows = [batch for batches in plan for batch in batches]
            batches = load(source, rows, Keeping(self.collate, source, names), workers=self.recipe.data.workers)
            for piece, own in zip(group, plan, strict=True):
                packed: dict[int, PackedSample] = {}
                aside: list[SetAside] = []
                for _ in own:
                    if self.stop.raised:
                        return False
                    batch = next(batches)
                    for index, sample in self.say(batch, split):
                        packed[index] = sample
                    aside += batch["aside"]
                    advance(len(batch["index"]))
                self.place.write(piece, [packed[index] for index in sorted(packed)], sorted(aside, key=lambda x: x.key))
        return True

    def batches(self, piece: Piece) -> list[Rows]:
        """Its clips, those of equal length together, cut by `data.evaluation_batch` and `data.budget`."""
        clips, costs = np.array(piece.clips), self.costs[piece.split]
        clips = clips[np.argsort(self.heard[piece.split][clips], kind="stable")]
        count = -(-len(clips) // self.recipe.data.evaluation_batch)
        slots = compose(clips, costs, 1, count) if costs else [[part.tolist()] for part in np.array_split(clips, count)]
        return [[(int(index), True) for index in slot] for (slot,) in slots if slot]

    @torch.no_grad()
    def say(self, batch: Any, split: Split) -> Iterator[tuple[int, PackedSample]]:
        """The features of a batch, clip by clip, by its position in the split.

        Raises:
            UserError: a value that is not finite, or not in the stored type.
        """
        batch["dropped"] = torch.tensor([[False, True, False]] * len(batch["label"]))  # text is imagined for all
        whole, simulated, *_ = self.model.streams(to_device(batch, device()))
        imagined = simulated if self.recipe.simulation.imagines else None
        streams = zip(self.passed, (whole.audio, whole.text, imagined), ("audio", "text", "audio"), strict=True)
        found = {
            name: None if states is None else rows_of(states, batch[f"{kind}_present"])
            for name, states, kind in streams
        }
        for row, sample in enumerate(batch["kept"]):
            if not batch["real"][row]:
                continue
            features = {name: None if values is None else values[row] for name, values in found.items()}
            features |= {name: sample[name] for name, passed in self.passed.items() if passed}
            with np.errstate(over="ignore"):
                for name, values in features.items():
                    if values is not None and not np.isfinite(values.astype(DTYPES[self.dtype])).all():
                        raise out_of_range(sample["key"], name, values, self.dtype)
            yield (
                sample["index"],
                pack_sample(
                    sample["key"],
                    float(self.splits[split].columns.label[sample["index"]]),  # as stored: a task may bound it
                    split,
                    text=sample["text"],
                    vision=sample["vision"],
                    extra=sample["record"],
                    dtype=DTYPES[self.dtype],
                    **features,
                ),
            )

    def finish(self, pieces: Sequence[Piece]) -> None:
        """Gives the dataset its name."""
        widths = {"audio": self.model.audio.width, "text": self.model.text_width, "simulated": self.model.text_width}
        info = self.place.finish(
            pieces,
            Dims(**widths, vision=self.vision),
            label_range=self.contents.label_range,
            features=self.identity,
            classes=self.contents.classes,
        )
        clips = sum(part.samples for part in info.splits.values())
        size = sum(entry.bytes for part in info.splits.values() for entry in part.shards)
        print(f"{clips} clips, {size / 1e9:.3g} GB of features in {self.place.out}")
        if info.set_aside:
            print(f"{len(info.set_aside)} clips set aside (all in dataset.json), first {info.set_aside[0].reason}")

    def bar(self, pieces: Sequence[Piece], ready: set[Piece]) -> Bar:
        """Of all ranks together, on rank 0."""
        return Bar(self.place, pieces, ready, quiet=self.rank != 0)


@dataclass
class Keeping:
    """Collates, and keeps of each sample what is not computed anew: "kept" and, of those set aside, "aside".

    Args:
        names: of a sample, to keep.
    """

    collate: Collator
    split: ShardedSplit
    names: Sequence[str]

    def __call__(self, samples: list[Sample]) -> Any:
        batch: dict[str, Any] = dict(self.collate(samples))
        batch["aside"] = [
            SetAside(key=sample["key"], reason=f"{sample['key']}: {sample['set_aside']}")
            for sample in samples
            if sample.get("set_aside")
        ]
        batch["kept"] = [
            {name: sample[name] for name in self.names} | {"record": self.record(sample)} for sample in samples
        ]
        return batch

    def record(self, sample: Sample) -> dict[str, Any]:
        """KEY.json; of a damaged sample nothing."""
        return {} if sample.get("set_aside") else self.split.record(sample["index"])


@dataclass
class Bar:
    """Clips made, those of other ranks seen by their tars."""

    place: Extraction
    pieces: Sequence[Piece]
    ready: set[Piece]
    quiet: bool

    def __enter__(self) -> Any:
        console = Console(stderr=True)
        columns = (TextColumn("clips"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=self.quiet or not console.is_terminal)
        before = sum(len(piece.clips) for piece in self.ready)
        self.task = self.progress.add_task("", total=sum(len(piece.clips) for piece in self.pieces), completed=before)
        self.own, self.looked = before, time.monotonic()
        self.progress.start()
        return self.advance

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def advance(self, clips: int) -> None:
        """After a batch of this rank."""
        self.own += clips
        if not self.progress.disable and time.monotonic() > self.looked + GLANCE:
            self.looked = time.monotonic()
            there = sum(len(piece.clips) for piece in self.pieces if self.place.marked(piece))
            self.progress.update(self.task, completed=max(there, self.own))


def deal(pieces: Sequence[Piece], costs: Sequence[float], ranks: int) -> list[list[Piece]]:
    """The costliest piece goes to the rank with least, and so on; each makes its own in their order."""
    loads = [(0.0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(pieces)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [[pieces[index] for index in sorted(share)] for share in shares]


def rows_of(states: TextStates, present: torch.Tensor) -> list[np.ndarray | None]:
    """The real positions [T, D] of each row, float32; None where the modality is absent."""
    masks = states.mask.cpu().numpy()
    values = states.states.float().cpu().numpy()
    rows: Iterable[tuple[np.ndarray, np.ndarray, bool]] = zip(values, masks, present.tolist(), strict=True)
    return [row[mask] if there else None for row, mask, there in rows]


def run_of(checkpoint: Path) -> tuple[RunDirectory, Path]:
    """The run of a checkpoint, or of its directory with its best checkpoint.

    Raises:
        UserError: it is neither.
    """
    path = checkpoint.resolve()
    inside = (path / MANIFEST).is_file()
    run = RunDirectory(path.parent.parent if inside else path)
    run.open()
    return run, path if inside else find_checkpoint(run, "best")


def out_of_range(key: str, name: str, values: np.ndarray, dtype: str) -> UserError:
    """Why a clip's features cannot be kept."""
    if np.isfinite(values).all():
        largest = float(np.abs(values).max())
        return UserError(
            f"sample {key}", f"has {name} features up to {largest:.3g}, beyond {dtype}", "Write --dtype float32."
        )
    return UserError(
        f"sample {key}", f"gets {name} features that are no finite numbers", "Write precision=fp32, or leave it out."
    )
