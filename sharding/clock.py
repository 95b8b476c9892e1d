"""Points in time of the device a rank computes on, and the seconds between them."""

from __future__ import annotations

import time
from typing import Any

import torch


def now() -> Any:
    """A point in time of the device: an event in its current stream, or seconds."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds between two points; events must have happened."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
