"""One optimizer step: one loss over the global batch, and its exact gradient over any number of micro-steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dist_train.batch import Batch
from dist_train.build import to_device
from dist_train.diagnose import non_finite_gradient, non_finite_loss
from dist_train.global_loss import GlobalLoss, Packed, global_loss, pack
from dist_train.losses import LossSettings
from dist_train.missing import Missing, drop
from dist_train.phases import phase
from dist_train.rollout import RolloutCache, remember
from sharding.agreement import Agreement
from sharding.census import Census
from sharding.collectives import device
from sharding.engine_state import own_gradient_norm


@dataclass
class StepResult:
    """One optimizer step, for metrics.jsonl."""

    loss: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    tokens: int = 0
    passages: int = 0
    clips: int = 0
    micro_steps: int = 0
    audio_positions: int = 0  # of this rank, padding included
    padded_positions: int = 0

    def add(self, values: dict[str, float], of: GlobalLoss, share: float) -> None:
        """Adds the loss and terms of some micro-steps, which hold this share of the step's clips."""
        self.tokens += of.tokens
        self.passages += of.passages
        self.clips += of.clips
        self.loss += values["loss"] * share
        for name, value in values.items():
            if name != "loss":
                self.terms[name] = self.terms.get(name, 0.0) + value * share


class Stepper:
    """Makes optimizer steps (collective).

    With exact accumulation all micro-steps form one window: each is run once without a graph to see its outputs, the
    loss is taken over all of them, and each is run again, with the same dropout, for its gradient. The last needs no
    second run. In approximate accumulation each micro-step is a window of its own: RMSE and RNC then compare the clips
    of one micro-step only.

    Args:
        engine: DeepSpeed engine around DoubleFlow.
        settings: of the losses.
        exact: see above.
        keys: of the training split, for messages.
        seed: dropout is a function of it, the step, the micro-step and the rank, so a replayed micro-step and a
            resumed run draw the same.
        agreement: whether the ranks run the same.
        census: whether every trainable learns.
        rollouts: answers kept over epochs (rollout `cached`).
        missing: what the missing flow lacks; of `random`, another modality in each epoch.
    """

    def __init__(
        self,
        engine: Any,
        settings: LossSettings,
        *,
        exact: bool,
        keys: Sequence[str],
        seed: int,
        agreement: Agreement,
        census: Census,
        rollouts: RolloutCache | None = None,
        missing: Missing = "text",
    ) -> None:
        self.engine, self.settings, self.exact, self.keys, self.seed = engine, settings, exact, keys, seed
        self.agreement, self.census, self.rollouts, self.missing = agreement, census, rollouts, missing
        self.step = self.epoch = 0

    def run(
        self, next_batch: Callable[[], Batch], rows: Sequence[Sequence[int]], clips: int, *, step: int, epoch: int
    ) -> StepResult:
        """Forward, loss, backward and update (collective).

        Args:
            step, epoch: of this optimizer step, from 0.
            next_batch: the next micro-batch of this rank, on the CPU.
            rows: [micro-step][rank] rows of each micro-batch.
            clips: of the step, over all ranks.

        Raises:
            UserError: a loss or a gradient is not finite.
        """
        self.step, self.epoch = step, epoch
        self.engine.train()
        micro_steps = list(range(len(rows)))
        result = StepResult(micro_steps=len(rows))
        seen = []
        for window in [micro_steps] if self.exact else [[micro] for micro in micro_steps]:
            with phase("data"):
                batches = {micro: self.fetch(next_batch, result) for micro in window}
            loss, packed = self.look(batches, max(map(sum, zip(*(rows[micro] for micro in window), strict=True))))
            if self.rollouts is not None:
                for batch in batches.values():
                    self.rollouts.store(batch)
            values = loss.values()
            if not np.isfinite(list(values.values())).all():
                raise non_finite_loss(step + 1, loss, list(batches.values()), self.keys)
            share = 1.0 if self.exact else loss.clips / clips
            result.add(values, loss, share)
            self.differentiate(batches, loss, packed, share, last=window[-1] == micro_steps[-1])
            seen.append((loss.rows, list(batches.values())))
        with phase("optimizer"):
            norm = own_gradient_norm(self.engine)
            self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        result.grad_norm = None if norm is None else float(norm)
        if result.grad_norm is not None and not np.isfinite(result.grad_norm):
            raise non_finite_gradient(step + 1, seen, self.settings, self.keys)
        return result

    def fetch(self, next_batch: Callable[[], Batch], result: StepResult) -> Batch:
        """The next micro-batch, on this rank's device."""
        batch = next_batch()
        result.audio_positions += batch["audio_mask"].numel()
        result.padded_positions += int((~batch["audio_mask"]).sum())
        drop(batch, self.missing, self.seed, self.epoch)
        if self.rollouts is not None:
            self.rollouts.fill(batch, self.epoch)
        return to_device(batch, device())

    def look(self, batches: dict[int, Batch], most: int) -> tuple[GlobalLoss, Packed]:
        """The loss of a window, and the outputs of its last micro-step with their graph."""
        *others, last = batches
        with torch.no_grad():
            packed = [self.forward(micro, batches[micro]).detached() for micro in others]
        kept = self.forward(last, batches[last])
        with phase("loss"):
            return global_loss([*packed, kept], self.settings, most), kept

    def forward(self, micro: int, batch: Batch) -> Packed:
        """Both flows over a micro-batch; a second call draws the same dropout."""
        draw = np.random.SeedSequence([self.seed, self.step, micro, dist.get_rank()])
        torch.manual_seed(int(draw.generate_state(1, np.uint64)[0]))
        with phase("forward"):
            with self.agreement.forward(self.step):
                flows = self.engine(batch)
            remember(batch, flows.answers)  # a second pass reads the same imagined text
            return pack(flows, batch)

    def differentiate(
        self, batches: dict[int, Batch], loss: GlobalLoss, kept: Packed, share: float, *, last: bool
    ) -> None:
        """Adds the gradient of `share` × loss to the engine's, the micro-step whose graph was kept first.

        Args:
            last: the window ends the step.
        """
        order = list(reversed(list(enumerate(batches))))
        for position, micro in order:
            packed = kept if position == len(batches) - 1 else self.forward(micro, batches[micro])
            ends = last and position == 0
            self.engine.set_gradient_accumulation_boundary(ends)
            with phase("backward"), self.agreement.backward(self.step):
                self.engine.backward(loss.surrogate(position, packed) * share, scale_wrt_gas=False)
                self.census.after_backward(self.step)  # inside: it names the cause, the agreement only the trainable
            if not ends:
                self.engine.step()  # only counts
