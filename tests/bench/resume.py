"""Resuming in the middle of an epoch of a million samples, against skipping through the tars with plain webdataset.

    python tests/bench/resume.py [--folder /tmp/resume] [--samples 1000000] [--rounds 3]

Samples of a few words (1,000 in a tar, about 2.3 GB in all) are written to --folder with the writer of `shards make`
unless they are there. Ours: opening the split, the order of the epoch, and the first batch of the step in the middle.
webdataset: the iterator over the tars, and all samples before the same position, none of them decoded; it is run whole,
nothing is extrapolated. webdataset's order is that of the tars, the cheapest it has. Rounds alternate (ours: median of
3); processor time is given too, for a machine that is shared. Files are in the page cache. The batch is compared with
first principles: sorted keys, permuted.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from sharding.order import EpochPlan
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, load_dataset
from sharding.shuffle import permutation
from sharding.stream import ShardedSplit, stream
from sharding.table import open_table, table_of

BATCH, SEED, EPOCH = 96, 5, 3
WORDS = ["good", "bad", "awful", "great", "film", "plot", "actor", "boring", "lovely", "really"]


def write(folder: Path, samples: int) -> None:
    """A corpus of short texts."""
    rng = np.random.default_rng(0)
    labels = rng.uniform(-3, 3, samples).round(3).tolist()
    picked = rng.integers(0, len(WORDS), (samples, 4))
    with write_dataset(folder, dims=Dims(), label_range=(-3, 3), samples_per_shard=1000) as writer:
        for i in range(samples):
            text = " ".join(WORDS[word] for word in picked[i])
            writer.add("train", pack_sample(f"clip{i:08d}", labels[i], "train", text=text))


def ours(folder: Path, step: int) -> tuple[float, float, float, list[str]]:
    """Seconds of opening and of all, processor seconds of all, and the keys of the first batch."""
    started, used = time.perf_counter(), time.process_time()
    split = ShardedSplit(folder, "train")
    opened = time.perf_counter() - started
    plan = EpochPlan(len(split), BATCH, 1, 1, SEED, EPOCH)
    keys = next(stream(split, plan, 0, keys_of, start_step=step))
    return opened, time.perf_counter() - started, time.process_time() - used, keys


def keys_of(samples: list[dict[str, Any]]) -> list[str]:
    """Stands for the collator."""
    return [sample["key"] for sample in samples]


def skipping(folder: Path, samples: int) -> tuple[float, float]:
    """Seconds and processor seconds until plain webdataset gives the sample behind the first `samples`."""
    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    started, used = time.perf_counter(), time.process_time()
    next(islice(iter(webdataset.WebDataset(urls, shardshuffle=False)), samples, None))
    return time.perf_counter() - started, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/resume"))
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    root = arguments.folder / f"shards-{arguments.samples}"
    if not root.exists():
        started = time.perf_counter()
        write(root, arguments.samples)
        print(f"written in {time.perf_counter() - started:.0f} s", flush=True)
    size = sum(path.stat().st_size for path in root.iterdir()) / 1e9
    step = arguments.samples // 2 // BATCH
    position = step * BATCH
    print(f"{arguments.samples} samples, {size:.2f} GB; resumed at sample {position}")

    print("\n| round | ours, s | of which opening | skipping, s | ratio | processor: ours, s | skipping, s | ratio |")
    print("|" + "---|" * 8)
    names = sorted(open_table(root, "train")[1].key)
    expected = [names[i] for i in permutation(len(names), SEED, EPOCH)[position : position + BATCH]]
    ratios = []
    for one in range(arguments.rounds):
        tries = [ours(root, step) for _ in range(3)]
        assert all(keys == expected for *_, keys in tries), "another order"
        opened, whole, used = np.median([row[:3] for row in tries], axis=0)
        skipped, skip_used = skipping(root, position)
        ratios.append((skipped / whole, skip_used / used))
        cells = f"{whole:.2f} | {opened:.2f} | {skipped:.1f} | {ratios[-1][0]:.0f} | {used:.2f} | {skip_used:.1f}"
        print(f"| {one} | {cells} | {ratios[-1][1]:.0f} |", flush=True)
    started = time.perf_counter()
    table_of(root, load_dataset(root, "train").indexes["train"])
    print(f"\nopening from the JSON indexes alone: {time.perf_counter() - started:.1f} s")
    elapsed, processor = np.median(ratios, axis=0)
    print(f"ratio, median of rounds: {elapsed:.0f}x elapsed, {processor:.0f}x processor time")


if __name__ == "__main__":
    main()
