"""plan.json of a run: what the planner foretold, and beside it what the run took; and the arithmetic behind its MFU."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dist_train.audio import SAMPLE_RATE
from dist_train.costs import audio_seconds
from dist_train.flops import FlopRates, audio_of_step, flop_rates, matrix_rate
from dist_train.plan import Measured, Plan, Planner, here, plan_as_is
from dist_train.plan_corpus import Corpus, clip_of, load_of
from dist_train.recipe import Recipe
from sharding.collectives import device, gather_objects
from sharding.exchange_time import Exchanged
from sharding.hardware import PROFILES, Hardware
from sharding.meter import Meter
from sharding.order import EpochPlan
from sharding.stream import ShardedSplit

MEASURED = 3  # step of a process that is measured: by then all is allocated, and ZeRO-3 knows the order of the modules


class Foresight:
    """Rank 0's plan of its run, and what the run takes. Whatever the planner or the disk refuses is told once and ends
    the foresight, not the training.

    Args:
        recipe: resolved.
        tokenizer: of the run.
        split: training split.
        nodes, per_node: ranks.
        path: of plan.json; what an earlier part of the run has measured is kept.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Any, split: ShardedSplit, nodes: int, per_node: int, path: Path
    ) -> None:
        self.recipe, self.path, self.world = recipe, path, nodes * per_node
        self.corpus = Corpus(split.columns, recipe.data.name, split.sources)
        self.rates: FlopRates | None = None
        self.meter: Meter | None = None
        self.attempt(partial(self.foretell, tokenizer, PROFILES[here()], nodes, per_node))

    def attempt(self, action: Callable[[], None]) -> None:
        """Runs what no training may fail of."""
        try:
            action()
        except Exception as error:  # the planner runs the model's code on any recipe: nothing can be ruled out
            self.rates = None
            reason = " ".join(str(error).split()) or type(error).__name__
            Console(stderr=True).print(f"This run has no plan and no MFU: {reason}", markup=False)

    def foretell(self, tokenizer: Any, hardware: Hardware, nodes: int, per_node: int) -> None:
        """Writes what is foretold, and finds what a step computes and the device can."""
        self.planner = Planner(self.recipe, tokenizer, hardware, nodes, per_node)
        load = load_of(self.recipe, self.corpus, self.world)
        plan = plan_as_is(self.planner, self.corpus, load)
        plan.model_copy(update={"measured": self.known()}).write(self.path)
        self.planner.traces.clear()
        if self.recipe.audio.input == "waveform":
            seconds = audio_seconds(self.recipe, self.corpus.columns)
            self.positions = np.maximum(np.round(seconds * SAMPLE_RATE), self.planner.model.audio.minimum_samples)
        else:
            self.positions = np.array([max(frames or 0, 1) for frames in self.corpus.columns.audio_frames])
        self.peak = matrix_rate(self.recipe.dtype, device())
        self.rates = flop_rates(self.recipe, tokenizer, hardware, [load.typical[0], load.worst, load.lightest])

    def known(self) -> Measured | None:
        """What plan.json holds of an earlier part of this run."""
        if not self.path.is_file():
            return None
        return Plan.model_validate_json(self.path.read_text(encoding="utf-8")).measured

    def arithmetic(self, plan: EpochPlan, epoch_step: int, passages: int, seconds: float) -> dict[str, float | None]:
        """flops: of a step over all ranks; mfu: its share of what matrix products of this type reach on the devices.

        Args:
            passages: through the language model's layers, over all ranks (see Flows).
            seconds: the step took.
        """
        if self.rates is None:
            return {"flops": None, "mfu": None}
        flops = self.rates.of(audio_of_step(plan, epoch_step, self.positions), passages)
        return {"flops": flops, "mfu": flops / (seconds * self.peak * self.world)}

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Measures the step that runs inside."""
        if self.rates is None:
            yield
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with Meter() as self.meter:
            yield

    def compare(self, plan: EpochPlan, epoch_step: int, step: int) -> None:
        """Puts what was measured into plan.json, beside what is foretold for the clips of that step."""
        if self.meter is not None:
            self.attempt(partial(self.write_step, plan, epoch_step, step, self.meter))
            self.meter = None

    def write_step(self, plan: EpochPlan, epoch_step: int, step: int, meter: Meter) -> None:
        """See `compare`."""
        own = [rows for _, rank, rows in plan.micro_batches(epoch_step) if rank == 0]
        clips = [[clip_of(self.recipe, self.corpus.columns, index) for index in rows] for rows in own]
        counts = plan.rows(epoch_step)  # of each rank in each micro-step: the loss pads them to the most of any rank
        exact = self.recipe.training.accumulated_loss == "exact"
        most = max(map(sum, zip(*counts, strict=True))) if exact else sum(map(max, counts))
        foretold = self.planner.predict(clips, rank=0, gathered=most, of=len(plan.batch(epoch_step)))
        self.planner.traces.clear()
        self.write(
            Measured(
                step=step,
                peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else meter.peak,
                foretold_peak_bytes=foretold.peak_bytes,
                foretold_peak_parts=foretold.peak_parts,
                wire_bytes=meter.wire,
                foretold_wire_bytes=foretold.wire_bytes,
            )
        )

    def exchange(self, found: Exchanged) -> None:
        """Puts into plan.json how much of the time in collectives was transfer."""
        if self.rates is not None:
            self.attempt(partial(self.write_exchange, found))

    def write_exchange(self, found: Exchanged) -> None:
        """See `exchange`."""
        measured = self.known()
        if measured is not None:
            values = {"exchange_seconds": found.seconds, "transfer_seconds": found.transfer_seconds}
            self.write(measured.model_copy(update={"exchange_steps": found.steps, **values}))

    def close(self, speed: dict[str, Any]) -> None:
        """Puts the mean step and the MFU of the finished run into plan.json."""
        if self.rates is not None:
            self.attempt(partial(self.write_pace, speed))

    def write_pace(self, speed: dict[str, Any]) -> None:
        """See `close`."""
        measured = self.known()
        if measured is not None:
            self.write(measured.model_copy(update={name: speed.get(name) for name in ("step_seconds", "mfu")}))

    def write(self, measured: Measured) -> None:
        """Replaces what was measured."""
        plan = Plan.model_validate_json(self.path.read_text(encoding="utf-8"))
        plan.model_copy(update={"measured": measured}).write(self.path)


def grid() -> tuple[int, int]:
    """Nodes, and ranks of each; where they hold unequal numbers, each rank counts as a node (collective)."""
    ranks = Counter(gather_objects(platform.node()))
    if len(set(ranks.values())) > 1:
        return sum(ranks.values()), 1
    return len(ranks), max(ranks.values())
