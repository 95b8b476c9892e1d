"""What really crosses the wire in a step, what the launcher takes beside it, and what timing collectives costs.

    python -m tests.bench.wire [--ranks 2 4] [--data data/demo] [--clips 25] [--timer]

Each world trains recipes/quickstart.yaml twice in a network of its own (`unshare --net`, needs root), one epoch and
two. The kernel counts what its loopback carries, headers and acknowledgements included; the difference is what the
second epoch sent. All its steps are full (1,400 clips of the demo corpus, 25 per rank and step), so a step sends the
same as the one that plan.json foretells. The launcher's processor time is read from the fifth to the last step.
`--timer`: seconds that the timer of collectives adds to a call, and per step; in this process alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml

from sharding.exchange_time import ExchangeTimer
from sharding.hardware import ring_bytes
from sharding.launch import free_port

TICKS = os.sysconf("SC_CLK_TCK")
# /sys/class/net would show the network that it was mounted in.
SHOW = """ip link set lo up; "$@"; code=$?; awk '$1 == "lo:" {print $10}' /proc/net/dev > $COUNTED; exit $code"""


class Done(NamedTuple):
    """Bytes that a run's loopback carried; its steps; the launcher's processor seconds per second; its plan."""

    carried: int
    steps: int
    launcher: float
    plan: dict[str, Any]


def train(folder: Path, data: Path, ranks: int, clips: int, epochs: int) -> Done:
    """One run in a network of its own."""
    output, counted = folder / f"{ranks}x{epochs}", folder / "carried"
    changes = [f"data.path={data}", f"data.batch={clips * ranks}", f"training.epochs={epochs}"]
    changes += ["training.validate_every=1000000", "training.watchdog_seconds=null"]  # whose store talks, too
    recipe = folder / "recipe.yaml"
    settings = yaml.safe_load(Path("recipes/quickstart.yaml").read_text())
    del settings["data"]["budget"]  # every rank gets as many clips
    recipe.write_text(yaml.safe_dump(settings))
    words = ["train", str(recipe), *changes, "--output", str(output), "--ranks", str(ranks)]
    inside = ["sh", "-c", SHOW, "sh", sys.executable, "-m", "dist_train.cli", *words]
    environment = {**os.environ, "COUNTED": str(counted), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(["unshare", "--net", *inside], env=environment, stdout=subprocess.DEVNULL)
    metrics, times = output / "metrics.jsonl", []
    while process.poll() is None:
        time.sleep(0.2)
        steps = metrics.read_text().count('"kind": "step"') if metrics.is_file() else 0
        if steps >= 5:
            times.append((time.monotonic(), launcher_seconds(process.pid)))
    if process.returncode:
        sys.exit(f"training failed with {process.returncode}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    (first, before), (last, after) = times[0], next(reversed([one for one in times if one[1] > 0]))
    return Done(
        int(counted.read_text()),
        sum(row["kind"] == "step" for row in rows),
        (after - before) / (last - first),
        json.loads((output / "plan.json").read_text()),
    )


def launcher_seconds(shell: int) -> float:
    """Processor seconds of the launcher, the shell's child; 0 when it has ended."""
    try:
        child = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0]
        fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def world(folder: Path, data: Path, ranks: int, clips: int) -> str:
    """A row of the table."""
    once, twice = (train(folder, data, ranks, clips, epochs) for epochs in (1, 2))
    steps = twice.steps - once.steps
    carried = (twice.carried - once.carried) / steps / ranks
    measured, foretold = (
        sum(ring.inside for ring in ring_bytes(Counter(twice.plan["measured"][name]), 1, ranks).values())
        for name in ("wire_bytes", "foretold_wire_bytes")
    )
    return (
        f"| {ranks} | {steps} | {foretold / 1e6:.4f} | {measured / 1e6:.4f} | {carried / 1e6:.4f} | "
        f"{foretold / carried:.2%} | {twice.launcher:.2%} |"
    )


def timer(calls: int = 3000, rounds: int = 9) -> str:
    """What the timer adds: to a collective, and to a step for being switched on and off."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    small, clock = torch.ones(1), ExchangeTimer()

    def spend(number: int) -> float:
        start = time.process_time()
        for _ in range(number):
            dist.all_reduce(small)
        return (time.process_time() - start) / number

    added = []
    for _ in range(rounds):
        bare = spend(calls)
        with clock:
            timed = spend(calls)
        clock.read()
        added.append(timed - bare)
    start = time.process_time()
    for _ in range(calls):
        with clock:
            pass
    switching = (time.process_time() - start) / calls
    dist.destroy_process_group()
    return f"a collective: {1e6 * statistics.median(added):.1f} µs more; on and off: {1e6 * switching:.0f} µs per step"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--clips", type=int, default=25, help="of a rank and step")
    parser.add_argument("--timer", action="store_true")
    arguments = parser.parse_args()
    if arguments.timer:
        print(timer())
        return
    print("| ranks | steps | foretold, MB | given, MB | carried, MB | foretold / carried | launcher, of a core |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            print(world(Path(folder), arguments.data, ranks, arguments.clips), flush=True)


if __name__ == "__main__":
    main()
