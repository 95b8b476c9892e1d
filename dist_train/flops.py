"""How much arithmetic a training step needs, from the lengths of its clips: what MFU divides by time.

Counted are the forward and backward passes of the model as the recipe has it, two operations per multiply-add: a frozen
base has no gradients of its weights. Left out is what is done only because of how it is run: recomputed activations,
replayed micro-steps (exact accumulation) and decoding. MFU as in PaLM (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dist_train.plan import Planner
from dist_train.plan_model import Clip
from dist_train.recipe import Recipe
from sharding.hardware import Hardware
from sharding.order import EpochPlan

# Side of the square product that measures a device, and seconds for which it is repeated.
SIDE = {"cuda": 8192, "cpu": 1024}
PATIENCE = 0.2


@dataclass(frozen=True)
class FlopRates:
    """FLOPs of forward and backward of a micro-batch: position · P + squared · P · T + passage · N, where P are its
    audio positions with padding, T those of its longest clip, and N the passages through the language model's layers
    (see Flows).
    """

    position: float
    squared: float
    passage: float

    def of(self, audio: Sequence[tuple[int, int]], passages: int) -> float:
        """FLOPs of some micro-batches.

        Args:
            audio: (clips, audio positions of the longest) of each.
            passages: of all of them.
        """
        positions = sum(clips * longest for clips, longest in audio)
        squares = sum(clips * longest**2 for clips, longest in audio)
        return self.position * positions + self.squared * squares + self.passage * passages


def flop_rates(
    recipe: Recipe, tokenizer: Any, hardware: Hardware, micro_batches: Sequence[Sequence[Clip]]
) -> FlopRates:
    """Traces some micro-batches.

    Args:
        recipe: resolved (feature widths filled in).
        tokenizer: of the run.
        hardware: whose kernels run.
        micro_batches: of lengths as unlike as they come.
    """
    recipe = recipe.model_copy(deep=True)
    recipe.audio.activation_checkpointing = recipe.text.activation_checkpointing = False
    planner = Planner(recipe, tokenizer, hardware, 1, 1)
    rows, done, spoken, passages = [], [], 0, 0
    for clips in micro_batches:
        micro = planner.trace(clips, len(clips), zero3=False)
        work = [one for one in micro.trace.work if one.phase != "decode"]
        read = sum(one.flops * one.times for one in work if one.part == "llm")
        rows.append([micro.clips * micro.longest, micro.clips * micro.longest**2])
        done.append(sum(one.flops * one.times for one in work) - read)
        spoken, passages = spoken + read, passages + micro.passages
    return FlopRates(*not_negative(np.array(rows, dtype=float), np.array(done, dtype=float)), spoken / max(passages, 1))


def not_negative(rows: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """The two rates from 0 on that explain the values best (least squares): both, or only one of them."""
    tried = []
    for kept in ([0, 1], [0], [1]):
        scale = rows[:, kept].max(0)
        found, *_ = np.linalg.lstsq(rows[:, kept] / scale, values, rcond=1e-6)
        rates = np.zeros(2)
        rates[kept] = found / scale
        if (rates >= 0).all():
            tried.append((float(np.square(rows @ rates - values).sum()), float(rates[0]), float(rates[1])))
    _, position, squared = min(tried)
    return position, squared


def audio_of_step(plan: EpochPlan, step: int, positions: np.ndarray) -> list[tuple[int, int]]:
    """(clips, audio positions of the longest) of every micro-batch of all ranks in a step.

    Args:
        positions: [n] audio positions of each training clip.
    """
    return [(len(rows), int(positions[rows].max())) for _, _, rows in plan.micro_batches(step)]


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product on this device with the threads this process has: the best of some."""
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < PATIENCE:
        best = min(best, seconds_of_product(left, right))
    return 2 * side**3 / best


def seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """Time of one product on the device's own clock."""
    if left.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    left @ right
    return time.perf_counter() - started
