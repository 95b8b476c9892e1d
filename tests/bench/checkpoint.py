"""How long training stands still for a checkpoint: written behind it, and waited for.

    python -m tests.bench.checkpoint [--ranks 2] [--parameters 30] [--steps 6] [--rounds 3] [--output DIR]

A stack of linear layers under ZeRO-2 with AdamW (12 bytes of checkpoint per parameter). In each round a number of steps
runs without a save, with one that is waited for, and with one behind it, in changing order. Printed: seconds that
`save` takes in both, the share of the blocking save that remains, and the seconds by which all the steps together take
longer. On a CPU the writer also takes processor time from the training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sharding.saver import CheckpointSettings, Saver
from sharding.zero import ZeroSettings, build_engine
from tests.ranks import run_ranks

WIDTH = 1024
MODES = ("none", "blocking", "behind")


def measure(folder: Path, parameters: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds by mode, of rank 0."""
    torch.manual_seed(0)
    layers = max(parameters * 1_000_000 // WIDTH**2, 1)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    engine = build_engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-4),
        ZeroSettings(stage=2, bucket_elements=5_000_000),
        micro_batch=64,
        accumulation=1,
        clip_norm=0.0,
        bf16=False,
    )
    rows = torch.randn(64, WIDTH)
    found: dict[str, Any] = {f"{what} {mode}": [] for what in ("steps", "save") for mode in MODES}
    saver = Saver(folder / "saved", CheckpointSettings(keep_last=1), {})
    number = 0

    def step() -> None:
        engine.backward(engine(rows).square().mean())
        engine.step()
        saver.poll()

    for _ in range(2):  # state and copy are made
        step()
        number += 1
        saver.save(engine, number, {})
        saver.finish()
    for turn in range(rounds):
        for mode in MODES[turn % 3 :] + MODES[: turn % 3]:
            dist.barrier()
            began = time.perf_counter()
            for place in range(steps):
                step()
                if place == 0 and mode != "none":
                    number += 1
                    before = time.perf_counter()
                    saver.save(engine, number, {})
                    if mode == "blocking":
                        saver.finish()
                    found[f"save {mode}"].append(time.perf_counter() - before)
            saver.finish()
            found[f"steps {mode}"].append(time.perf_counter() - began)
            dist.barrier()
    newest = sorted((folder / "saved").glob("step_*"))[-1]
    found["bytes"] = sum(path.stat().st_size for path in newest.iterdir())
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=30, help="Millions.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.output or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        found = run_ranks(
            "measure",
            arguments.ranks,
            folder,
            module="tests.bench.checkpoint",
            parameters=arguments.parameters,
            steps=arguments.steps,
            rounds=arguments.rounds,
        )
    middle = {name: statistics.median(values) for name, values in found.items() if isinstance(values, list) and values}
    blocking, behind = middle["save blocking"], middle["save behind"]
    print(json.dumps({name: round(value, 3) for name, value in middle.items()}, indent=1))
    print(f"checkpoint: {found['bytes'] / 1e6:.0f} MB by {arguments.ranks} ranks, median of {arguments.rounds} rounds")
    print(f"the training stands still {behind:.3f} s instead of {blocking:.3f} s: {behind / blocking:.1%}")
    slower = {mode: middle[f"steps {mode}"] - middle["steps none"] for mode in MODES[1:]}
    print(f"{arguments.steps} steps take {slower['behind']:.3f} s longer instead of {slower['blocking']:.3f} s")


if __name__ == "__main__":
    main()
