"""Resuming in the middle of an epoch of a million samples, against skipping through the tars with plain webdataset.

    python tests/bench/resume.py [--folder /tmp/resume] [--samples 1000000] [--rounds 5]

Samples of a few words (1,000 in a tar, about 2.4 GB in all) are written to --folder with the writer of `shards make`
unless they are there. Ours: opening the split, the order of the epoch, and the first batch of the step in the middle.
webdataset: the iterator over the tars, and all samples before the same position, none of them decoded; it is run whole,
nothing is extrapolated. webdataset's order is that of the tars, the cheapest it has. Files are in the page cache. The
batch is compared with first principles: sorted keys, permuted.
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
from sharding.table import table_of

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


def ours(folder: Path, step: int) -> tuple[float, float, list[str]]:
    """Seconds of opening and of all, and the keys of the first batch."""
    started = time.perf_counter()
    split = ShardedSplit(folder, "train")
    opened = time.perf_counter() - started
    plan = EpochPlan(len(split), BATCH, 1, 1, SEED, EPOCH)
    keys = next(stream(split, plan, 0, keys_of, start_step=step))
    return opened, time.perf_counter() - started, keys


def keys_of(samples: list[dict[str, Any]]) -> list[str]:
    """Stands for the collator."""
    return [sample["key"] for sample in samples]


def skipping(folder: Path, samples: int) -> float:
    """Seconds until plain webdataset gives the sample behind the first `samples`."""
    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    started = time.perf_counter()
    next(islice(iter(webdataset.WebDataset(urls, shardshuffle=False)), samples, None))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/resume"))
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
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

    found = [ours(root, step) for _ in range(arguments.rounds)]
    started = time.perf_counter()
    table = table_of(root, load_dataset(root, "train").indexes["train"])
    indexes = time.perf_counter() - started
    names = sorted(table.key)
    expected = [names[i] for i in permutation(len(names), SEED, EPOCH)[position : position + BATCH]]
    assert all(keys == expected for _, _, keys in found), "another order"
    skipped = skipping(root, position)
    opened, whole = (float(np.median([one[column] for one in found])) for column in (0, 1))
    print(f"ours: {whole:.2f} s in the median of {arguments.rounds}, of which opening {opened:.2f} s")
    print(f"      each: {' '.join(f'{one[1]:.2f}' for one in found)}; opening from the JSON indexes: {indexes:.2f} s")
    print(f"skipping: {skipped:.1f} s ({position / skipped:.0f} samples/s)")
    print(f"ratio {skipped / whole:.0f}x")


if __name__ == "__main__":
    main()
