"""Saving a training run's state: every rank writes its share of the tensors, behind the training if wanted."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sharding import portable
from sharding.checkpoint import buffers, trainables
from sharding.collectives import any_rank, gather_objects, together
from sharding.engine_state import MOMENTS, adam_step, master, moment, share
from sharding.errors import UserError
from sharding.heartbeat import beat
from sharding.portable import Entry, Kind
from sharding.retention import LAST, point, prune, step_directory


class CheckpointSettings(BaseModel):
    """When to save, what to keep, and how. After each validation is always saved."""

    model_config = ConfigDict(extra="forbid")

    every_steps: int | None = Field(
        None, ge=1, description="Save every N optimizer steps, too. Default: only after validations."
    )
    keep_last: int = Field(2, ge=1, description="Newest checkpoints that are kept; the best one is always kept.")
    keep_every: int | None = Field(
        None, ge=1, description="Checkpoints of every N-th step are saved and kept for good. Default: none."
    )
    asynchronous: bool = Field(
        True, description="Copy the state, go on training, and write the copy meanwhile (its memory stays taken)."
    )

    def due(self, step: int) -> bool:
        """Whether to save after this step, validated or not."""
        return any(every is not None and step % every == 0 for every in (self.every_steps, self.keep_every))


class Saver:
    """Writes the checkpoints of one run. All its methods are collective.

    One save is under way at a time. A save is complete once all ranks have written and rank 0 has renamed it, which
    happens in the next `poll` or `finish` after that; until then, and if anything fails, earlier checkpoints count.

    Args:
        root: the run's directory of checkpoints, on a file system that all ranks share. A saver serves one engine.
        settings: of the recipe.
        pointers: what the checkpoint that the run continues from pointed to.
    """

    def __init__(self, root: Path, settings: CheckpointSettings, pointers: Mapping[str, int]) -> None:
        self.root, self.settings = root, settings
        self.pointers = dict(pointers)
        self.shares: dict[Kind, dict[str, Tensor]] = {kind: {} for kind in get_args(Kind)}
        self.owners: dict[str, Owner] = {}  # who holds what does not change during a run
        self.pending: _Writing | None = None

    def save(self, engine: Any, step: int, state: dict[str, Any], pointers: Collection[str] = ()) -> None:
        """Copies what the engine holds and writes it as the checkpoint of `step`; `last` and these pointers will name
        it.

        Args:
            state: JSON-able; Adam's step and the pointers are added.

        Raises:
            UserErrors: this or the previous checkpoint cannot be written. Earlier ones stay whole.
        """
        self.finish()
        directory = step_directory(self.root, step)
        self.pointers.update(dict.fromkeys(pointers, step))
        state = {**state, "adam_step": adam_step(engine), "pointers": self.pointers.copy()}
        beat("saving")
        self._copy(engine)
        together(lambda: _begin(directory))
        self.pending = _Writing(directory, step, state, self.shares)
        if not self.settings.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Completes the save under way if all ranks have written. Costs one exchange of a flag while one is."""
        if self.pending is not None and not any_rank(self.pending.thread.is_alive()):
            self._complete(self.pending)

    def finish(self) -> None:
        """Waits for the save under way, and completes it.

        Raises:
            UserErrors: it cannot be written.
        """
        if self.pending is not None:
            beat("saving")
            self.pending.thread.join()
            self._complete(self.pending)

    def _copy(self, engine: Any) -> None:
        """Brings this rank's share of weights and moments up to date in its own memory, which is kept from save to
        save: fresh memory would cost more than the copy.
        """
        if not self.owners:
            self.owners = owners_of(engine)
        for kind, name, value in owned(engine, self.owners):
            kept = self.shares[kind]
            if name not in kept:
                kept[name] = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
            kept[name].copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _complete(self, done: _Writing) -> None:
        self.pending = None
        files = gather_objects(done.files)

        def complete() -> None:
            try:
                done.check()
                if dist.get_rank() == 0 and all(part is not None for part in files):
                    portable.commit(
                        done.directory, {name: entry for part in files for name, entry in part.items()}, done.state
                    )
                    point(self.root, {**done.state["pointers"], LAST: done.step})
                    prune(self.root, self.settings.keep_last, self.settings.keep_every)
            except OSError as error:
                raise unwritable(done.directory, error) from None

        try:
            together(complete)
        finally:
            if dist.get_rank() == 0:
                shutil.rmtree(portable.writing(done.directory), ignore_errors=True)  # of a save that failed


class _Writing:
    """One rank's part of a save under way."""

    def __init__(
        self, directory: Path, step: int, state: dict[str, Any], shares: Mapping[Kind, Mapping[str, Tensor]]
    ) -> None:
        self.directory, self.step, self.state = directory, step, state
        self.files: dict[str, Entry] | None = None
        self.error: BaseException | None = None
        parts = {portable.part_name(kind, dist.get_rank() + 1, dist.get_world_size()): shares[kind] for kind in shares}
        self.thread = threading.Thread(target=self._write, args=(parts,), name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        try:
            files: dict[str, Entry] = {}
            for name, tensors in parts.items():
                files |= portable.write_part(portable.writing(self.directory), name, tensors)
            self.files = files
        except BaseException as error:  # raised where the training waits for it
            self.error = error

    def check(self) -> None:
        """Raises what went wrong while writing."""
        if self.error is not None:
            raise self.error


def _begin(directory: Path) -> None:
    if dist.get_rank() == 0:
        try:
            portable.begin(directory)
        except OSError as error:
            raise unwritable(directory, error) from None


def unwritable(directory: Path, error: OSError) -> UserError:
    """What is told of a checkpoint that the disk refuses."""
    return UserError(
        str(directory),
        f"cannot be written ({error.strerror or error})",
        "Free space or permissions, then run again with --resume: earlier checkpoints are whole.",
    )


class Owner(NamedTuple):
    """Which rank writes a tensor, and whether it holds all of it."""

    rank: int
    alone: bool


def owners_of(engine: Any) -> dict[str, Owner]:
    """Of each trainable the rank that holds most of it, of each buffer any; by size about the same (collective)."""
    parameters, held = trainables(engine.module), buffers(engine.module)
    everyone = range(dist.get_world_size())
    sizes = {name: int(getattr(one, "ds_numel", one.numel())) for name, one in parameters.items()}
    parts = [share(engine, one) for one in parameters.values()]
    counts = gather_objects([0 if part is None else part.count for part in parts])
    most = dict(zip(sizes, map(max, zip(*counts, strict=True)), strict=True))
    candidates: dict[str, Sequence[int]] = {
        name: [rank for rank in everyone if counts[rank][place] == most[name]] for place, name in enumerate(sizes)
    }
    ranks = spread(sizes, candidates) | spread(
        {name: one.numel() for name, one in held.items()}, dict.fromkeys(held, everyone)
    )
    return {name: Owner(rank, name in held or most[name] == sizes[name]) for name, rank in ranks.items()}


def owned(engine: Any, owners: Mapping[str, Owner]) -> Iterator[tuple[Kind, str, Tensor]]:
    """What this rank writes: whole tensors, so that everyone can read them. What no rank holds whole is put together at
    its owner (collective; take all of it).
    """
    rank = dist.get_rank()
    stepped = adam_step(engine) > 0
    for name, parameter in trainables(engine.module).items():
        owner, alone = owners[name]
        if owner != rank and alone:
            continue
        value = master(engine, parameter, to=owner)
        if owner == rank:
            yield "model", name, value
        for which in MOMENTS if stepped else ():
            value = moment(engine, parameter, which, to=owner)
            if owner == rank:
                yield "optimizer", f"{which}.{name}", value
    for name, value in buffers(engine.module).items():
        if owners[name].rank == rank:
            yield "model", name, value


def spread(sizes: Mapping[str, int], candidates: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """One of the candidate ranks for each name, so that all have about the same sum; the same on every rank."""
    loads: Counter[int] = Counter()
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = min(candidates[name], key=lambda rank: (loads[rank], rank))
        loads[owners[name]] += sizes[name]
    return owners
