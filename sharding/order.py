"""Which sample goes where: a pure function of (seed, epoch), whatever the number of shards, workers and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sharding.budget import Cost, Layout, cheapest, compose
from sharding.shuffle import Source, Window, epoch_order

_KEPT_LAYOUTS = 64  # steps; the loader asks for each several times


@dataclass(frozen=True)
class EpochPlan:
    """The steps of one epoch, cut over micro-steps × ranks.

    Step s trains on samples [s·G, (s+1)·G) of the epoch's order; the last step may have fewer. This batch of R samples
    is laid over the slots (micro-step, rank): without `costs` as evenly as possible over `accumulation` micro-steps;
    with them over as few micro-steps as keep every slot within every limit (see `sharding.budget.compose`). All ranks
    make the same number of micro-steps. The batch itself does not depend on world size, accumulation or costs: a run
    continues at step `samples_consumed // global_batch`, at any world size.

    Args:
        samples: size of the split, >= 1.
        global_batch: G, samples per optimizer step, >= 1.
        accumulation: micro-steps per optimizer step, >= 1; with `costs`, the least number.
        world_size: ranks, >= 1.
        seed: order seed.
        epoch: epoch number, from 0.
        shuffle: False visits the samples in key order, each once (evaluation).
        costs: what a slot may hold at most.
        sources: the datasets of a mix (see `shuffle.epoch_order`); none: one dataset.
        window: shuffles within windows; None: globally.

    Raises:
        ValueError: a size is below 1, or the sources have another number of samples.
    """

    samples: int
    global_batch: int
    accumulation: int
    world_size: int
    seed: int
    epoch: int
    shuffle: bool = True
    costs: tuple[Cost, ...] = ()
    sources: tuple[Source, ...] = ()
    window: Window | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "global_batch", "accumulation", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        total = sum(source.samples for source in self.sources)
        if self.sources and total != self.samples:
            raise ValueError(f"the sources have {total} samples, not {self.samples}")

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [samples]: the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.samples)
        return epoch_order(self.sources or (Source(self.samples),), self.seed, self.epoch, self.window)

    @property
    def steps(self) -> int:
        """Optimizer steps of the epoch, the uneven last one included."""
        return -(-self.samples // self.global_batch)

    def batch(self, step: int) -> np.ndarray:
        """int64 [R]: the global batch of a step, R = global_batch or, in the last step, what is left."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps} steps")
        return self.order[step * self.global_batch : (step + 1) * self.global_batch]

    @cached_property
    def _layouts(self) -> dict[int, Layout]:
        return {}

    def layout(self, step: int) -> Layout:
        """[micro-step][rank] → the sample indices of that slot; an empty slot has none."""
        if step not in self._layouts:
            batch = self.batch(step)
            if len(self._layouts) > _KEPT_LAYOUTS:
                self._layouts.clear()
            self._layouts[step] = (
                compose(batch, self.costs, self.world_size, self.accumulation)
                if self.costs
                else spread(batch, self.world_size, self.accumulation)
            )
        return self._layouts[step]

    def micro_steps(self, step: int) -> int:
        """Micro-steps of a step, the same on all ranks."""
        return len(self.layout(step))

    def rows(self, step: int) -> list[list[int]]:
        """[micro-step][rank] → rows of that slot, fillers included; without `costs` all have as many."""
        layout = self.layout(step)
        most = 1 if self.costs else max(len(slot) for slots in layout for slot in slots)
        return [[max(len(slot), most) for slot in slots] for slots in layout]

    def micro_batch(self, step: int, micro: int, rank: int) -> list[tuple[int, bool]]:
        """The rows of one rank in one micro-step.

        Without `costs`, concatenating the real rows over micro (outer) and rank (inner) gives `batch(step)`, and every
        slot is filled up to the same number of rows. With `costs` only an empty slot is filled, by one row.

        Returns:
            [(sample index, real)]. real=False marks a filler: a repeat of a sample of this batch that only keeps the
            ranks in step and must not enter the loss.

        Raises:
            IndexError: step, micro or rank is out of range.
        """
        if not (0 <= micro < self.micro_steps(step) and 0 <= rank < self.world_size):
            raise IndexError(f"micro {micro} of {self.micro_steps(step)}, rank {rank} of {self.world_size}")
        return self._filled(step, micro, rank, self.rows(step)[micro][rank])

    def micro_batches(self, step: int) -> Iterator[tuple[int, int, list[int]]]:
        """(micro-step, rank, sample indices) of every slot of a step, fillers included."""
        for micro, counts in enumerate(self.rows(step)):
            for rank, count in enumerate(counts):
                yield micro, rank, [index for index, _ in self._filled(step, micro, rank, count)]

    def _filled(self, step: int, micro: int, rank: int, rows: int) -> list[tuple[int, bool]]:
        batch, mine = self.batch(step), self.layout(step)[micro][rank]
        if mine:
            filler = mine[0]
        elif self.costs:
            filler = cheapest(batch, self.costs)
        else:
            filler = int(batch[(micro * self.world_size + rank) % len(batch)])
        return [(index, True) for index in mine] + [(filler, False)] * (rows - len(mine))


def spread(batch: np.ndarray, world_size: int, accumulation: int) -> Layout:
    """Lays a batch over slots (micro-step major, then rank) as evenly as possible; the first hold one sample more."""
    parts = iter(np.array_split(batch, world_size * accumulation))
    return [[next(parts).tolist() for _ in range(world_size)] for _ in range(accumulation)]
