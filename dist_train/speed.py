"""How fast a run was and where its time went, from its metrics.jsonl."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch

WARM_UP = 2  # steps not counted: compilation, first allocations


def read_steps(metrics: Path) -> list[dict[str, Any]]:
    """The step lines of metrics.jsonl."""
    rows = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["kind"] == "step"]


def speed(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals over all steps but the first two and those measured for plan.json (over all, if there are no more).

    Returns:
        step_seconds (mean), clips_per_second, tokens_per_second (language model positions; all ranks), data_share (of
        the time, waiting for data), exchange_share (in collectives, of rank 0; None if unknown), rollout_share
        (decoding imagined text), phase_seconds (per step, of rank 0), padding_share (of rank 0's audio positions),
        micro_steps (per step), mfu (share of what matrix products reach on these devices; None if unknown).
    """
    steps = [row for row in steps[WARM_UP:] if not row.get("measured")] or steps
    if not steps:
        return {}
    seconds = sum(row["step_seconds"] for row in steps)
    phases: dict[str, float] = {}
    for row in steps:
        for name, value in row["phases"].items():
            phases[name] = phases.get(name, 0.0) + value
    count = len(steps)
    used = [row.get("mfu") for row in steps]
    exchanged: list[Any] = [row.get("exchange_seconds") for row in steps]
    return {
        "step_seconds": seconds / count,
        "mfu": None
        if None in used
        else sum(share * row["step_seconds"] for share, row in zip(used, steps, strict=True)) / seconds,
        "clips_per_second": sum(row["clips"] for row in steps) / seconds,
        "tokens_per_second": sum(row["tokens"] for row in steps) / seconds,
        "data_share": sum(row["data_seconds"] for row in steps) / seconds,
        "exchange_share": None if None in exchanged else sum(exchanged) / seconds,
        "rollout_share": phases.get("rollout", 0.0) / seconds,
        "phase_seconds": {name: value / count for name, value in phases.items()},
        "padding_share": sum(row["padding_share"] for row in steps) / count,
        "micro_steps": sum(row["micro_steps"] for row in steps) / count,
    }


def peak_bytes() -> int:
    """Most memory held so far: of the GPU, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
