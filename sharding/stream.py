"""Samples from shards: a map-style dataset over one split, and the micro-batches of one rank in plan order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from sharding.errors import UserError, UserErrors
from sharding.order import EpochPlan
from sharding.readahead import Readahead
from sharding.shards import Dims, Features, read_record, read_sample
from sharding.shuffle import Source
from sharding.table import Table, open_table

Sample = dict[str, Any]
_MAX_OPEN = 64  # descriptors per process; a corpus may have more tars than a process may open files


class Contents(Protocol):
    """What dataset.json tells, of one dataset or of a mix."""

    @property
    def splits(self) -> Mapping[Any, Any]: ...
    @property
    def dims(self) -> Dims: ...
    @property
    def label_range(self) -> tuple[float, float]: ...
    @property
    def content_hash(self) -> str: ...
    @property
    def features(self) -> Features | None: ...
    @property
    def classes(self) -> list[str] | None: ...


class ShardedSplit(Dataset[Sample]):
    """One split, addressed by the sample's position in key order (so the shard layout does not show).

    Picklable; descriptors are opened on first use in each process.

    Args:
        root: directory made by `dist-train shards make`.
        split: train, valid or test.
        on_bad_sample: "stop" raises, "set_aside" returns the sample with all modalities absent and
            "set_aside": reason.

    Attributes:
        keys: sample keys, sorted.
        labels: float64 [n].
        columns: the index, in the order of `keys`.
        dims: widths shared by all samples.
        info: dataset.json.
        text_field: of KEY.json, whose text stands in the place of the transcript; None: the transcript itself.
        sources: what an epoch draws from (`EpochPlan.sources`): this one dataset.

    Raises:
        UserError: see `shards.load_dataset`.
    """

    def __init__(self, root: Path | str, split: str, on_bad_sample: Literal["stop", "set_aside"] = "stop") -> None:
        self.split, self.on_bad_sample = split, on_bad_sample
        info, table = open_table(Path(root), split)
        self.info: Contents = info
        self.take(table, info.dims, (Source(len(table)),))

    def take(self, table: Table, dims: Dims, sources: tuple[Source, ...]) -> None:
        """Serves the samples of this table."""
        self.columns, self.dims, self.sources = table, dims, sources
        self.keys: Sequence[str] = table.key
        self.text_field: str | None = None
        self.labels = table.label
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """One sample.

        Returns:
            {"key", "index", "label", "audio": float32 [samples] in [-1, 1] or [T, D] or None, "text": str or None,
            "text_features", "simulated", "vision": float32 [T, D] or None}, and "set_aside": reason where a bad
            sample was set aside (all modalities None).

        Raises:
            IndexError: beyond the split.
            UserError: under "stop", the sample is damaged or of another width than dataset.json states.
        """
        if not 0 <= index < len(self.keys):
            raise IndexError(f"sample {index} of {len(self.keys)}")
        sample: Sample = {"key": self.keys[index], "index": index, "label": float(self.labels[index])}
        try:
            return sample | self._read(index) | self._other_text(index)
        except UserError as error:
            if self.on_bad_sample == "stop":
                raise
            absent = dict.fromkeys(("audio", "text", "text_features", "simulated", "vision"))
            return sample | absent | {"set_aside": str(error)}

    def _other_text(self, index: int) -> dict[str, str | None]:
        """What stands in the place of the transcript, if anything does."""
        if self.text_field is None:
            return {}
        text = self.record(index).get(self.text_field)
        if text is not None and not isinstance(text, str):
            where = f"sample {self.keys[index]}"
            raise UserError(where, f"has a {self.text_field} that is no text", "Name another field of KEY.json.")
        return {"text": text or None}

    def name_in_tar(self, index: int) -> str:
        """The key as the tar's members have it."""
        return self.keys[index]

    def record(self, index: int) -> dict[str, Any]:
        """KEY.json of a sample, whose bytes `__getitem__` has compared with their checksum.

        Raises:
            UserError: it is no JSON object.
        """
        c = self.columns
        tar = int(c.tar[index])
        data = os.pread(self.descriptor(tar), int(c.size[index]), int(c.offset[index]))
        return read_record(self.name_in_tar(index), data, c.tars[tar])

    def _read(self, index: int) -> Sample:
        c = self.columns
        tar = int(c.tar[index])
        return read_sample(
            self.descriptor(tar),
            c.tars[tar],
            self.dims,
            key=self.name_in_tar(index),
            offset=int(c.offset[index]),
            size=int(c.size[index]),
            sha256=c.sha256[index].tobytes().hex(),
        )

    def descriptor(self, tar: int) -> int:
        """Of an open tar.

        Raises:
            UserError: it cannot be opened.
        """
        if tar not in self._open:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            path = self.columns.tars[tar]
            try:
                self._open[tar] = os.open(path, os.O_RDONLY)
            except OSError as error:
                problem = f"cannot be opened ({error.strerror})"
                raise UserError(path, problem, "Check that the shards are still there") from error
        return self._open[tar]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


class _Rows(Dataset[Any]):
    """Reads (index, real) rows; hands errors over as values, because DataLoader rewrites what its workers raise."""

    def __init__(self, split: ShardedSplit) -> None:
        self.split = split

    def __getitem__(self, row: tuple[int, bool]) -> Sample | UserError:
        index, real = row
        try:
            sample = self.split[index]
        except UserError as error:
            return error
        if not real:
            sample.pop("set_aside", None)  # counted once, by its real row
        return sample | {"real": real and "set_aside" not in sample}


class _Collate:
    def __init__(self, collate: Callable[[list[Sample]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Sample | UserError]) -> Any:
        samples = [row for row in rows if not isinstance(row, UserError)]
        errors = {str(row): row for row in rows if isinstance(row, UserError)}
        if errors:
            return UserErrors(list(errors.values())) if len(errors) > 1 else next(iter(errors.values()))
        try:
            return self.collate(samples)
        except (UserError, UserErrors) as error:
            return error


def _ignore_signals(worker: int) -> None:
    # Ctrl-C and the scheduler's warning reach the whole process group; only the trainer's handler may act on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def stream(
    split: ShardedSplit,
    plan: EpochPlan,
    rank: int,
    collate: Callable[[list[Sample]], Any],
    *,
    start_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Any]:
    """The micro-batches of one rank from `start_step` to the end of the epoch, step by step, micro by micro.

    Nothing before `start_step` is read, so resuming costs no more than starting.

    Args:
        split: the samples; len(split) must be plan.samples.
        plan: order and cut of the epoch.
        rank: whose rows.
        collate: gets the samples of a micro-batch, each with "real": bool. real=False marks a filler or a
            sample set aside (which also has "set_aside": reason, once per epoch); it must not enter the loss.
            Picklable where workers are spawned.
        start_step: samples_consumed // plan.global_batch.
        workers: loader processes; 0 reads in this process.
        pin_memory: pin the collated tensors.

    Raises:
        UserError: a bad sample under "stop", also out of a worker.
        UserErrors: several in one micro-batch.
    """
    if plan.samples != len(split):
        raise ValueError(f"the plan is for {plan.samples} samples, the split has {len(split)}")
    ahead = Readahead(split.columns) if plan.shuffle and plan.window else None
    rows = rows_of_rank(plan, rank, start_step) if ahead is None else rows_behind(ahead, plan, rank, start_step)
    try:
        yield from load(split, rows, collate, workers=workers, pin_memory=pin_memory)
    finally:
        if ahead is not None:
            ahead.close()


Rows = list[tuple[int, bool]]


def load(
    split: ShardedSplit,
    rows: Iterable[Rows],
    collate: Callable[[list[Sample]], Any],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Any]:
    """The micro-batches of these rows (sample index, real); see `stream`."""
    loader = DataLoader(
        _Rows(split),
        batch_sampler=rows,
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, (UserError, UserErrors)):
            raise batch
        yield batch


def rows_of_rank(plan: EpochPlan, rank: int, start: int, end: int | None = None) -> Iterator[Rows]:
    """The rows of one rank's micro-batches from step `start` to before step `end`."""
    for step in range(start, plan.steps if end is None else end):
        for micro in range(plan.micro_steps(step)):
            yield plan.micro_batch(step, micro, rank)


def rows_behind(ahead: Readahead, plan: EpochPlan, rank: int, start: int) -> Iterator[Rows]:
    """The same; those of a window only after the rank's part of it has been read, and while that of the next is."""
    assert plan.window is not None
    number = np.arange(plan.steps) * plan.global_batch // plan.window.samples  # of the window in which a step begins
    edges = [start, *(np.flatnonzero(np.diff(number)) + 1).tolist(), plan.steps]
    edges = sorted({edge for edge in edges if edge >= start})

    def read(first: int, last: int) -> Future[None]:
        samples = {index for rows in rows_of_rank(plan, rank, first, last) for index, _ in rows}
        return ahead.start(np.array(sorted(samples), np.int64))

    waiting = [read(*edges[:2])] if len(edges) > 1 else []
    for place, (first, last) in enumerate(pairwise(edges)):
        if place + 2 < len(edges):
            waiting.append(read(*edges[place + 1 : place + 3]))
        waiting.pop(0).result()
        yield from rows_of_rank(plan, rank, first, last)
