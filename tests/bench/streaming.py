"""Streaming: against plain webdataset with the same decode, and the windowed order against the global one when cold.

    python tests/bench/streaming.py [--folder /tmp/streaming] [--clips 3000] [--rounds 5]
    python tests/bench/streaming.py --cold [--iops 200] [--rounds 3]

Clips of log-normal length (mean 3 s of PCM16, faces of width 64, a few words, 1,000 in a tar) are written to --folder
with the writer of `shards make` unless they are there.

Warm: one epoch, one loader process, batches of 32 padded by the same collator on both sides. Ours looks up an index,
visits in a global permutation and checks every sample's sha256; webdataset reads the tars from front to back and checks
nothing. Sides alternate; the files are in the page cache.

--cold: one epoch in the global and in the windowed order, sides alternating; the tars are dropped from the page cache
before each (posix_fadvise DONTNEED). --iops N adds a cgroup of this process's own that lets the disk answer N reads a
second (needs root and cgroup v1): so a network file system behaves that takes long to answer and then streams. Counted
are the bytes that came from the disk (/proc/self/io; no loader processes, so that all reads are this process's) and, of
the order, how often reading goes on at another place than where the last range ended. Then how random the orders are:
how often two clips of a batch are of the same block, and how far the order of keys lies from that of the epoch, as
parts of what a uniform permutation has.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import webdataset

from sharding.order import EpochPlan
from sharding.readahead import byte_ranges
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims
from sharding.shuffle import Window
from sharding.stream import ShardedSplit, stream

BATCH, SEED, FACES, RATE = 32, 1, 64, 16_000
WORDS = ["good", "bad", "awful", "great", "film", "plot", "actor", "boring", "lovely", "really"]
CGROUP = Path("/sys/fs/cgroup/blkio/dist-train-bench")


def write(folder: Path, clips: int) -> None:
    """A corpus of clips with sound, faces and words."""
    rng = np.random.default_rng(0)
    dims = Dims(audio="waveform", vision=FACES)
    noise = rng.uniform(-0.5, 0.5, 40 * RATE).astype(np.float32)
    with write_dataset(folder, dims=dims, label_range=(-3, 3), samples_per_shard=1000) as writer:
        for i in range(clips):
            seconds = float(np.clip(np.exp(rng.normal(np.log(3) - 0.18, 0.6)), 0.5, 30))
            sample: dict[str, Any] = {"audio": noise[rng.integers(5 * RATE) :][: int(seconds * RATE)]}
            sample["vision"] = rng.normal(size=(max(int(seconds * 3), 1), FACES)).astype(np.float32)
            sample["text"] = " ".join(rng.choice(WORDS, int(seconds * 3) + 1))
            writer.add("train", pack_sample(f"clip{i:06d}", round(float(rng.uniform(-3, 3)), 3), "train", **sample))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Padded tensors, as a trainer gets them."""
    batch: dict[str, Any] = {"text": [sample["text"] for sample in samples]}
    for name in ("audio", "vision"):
        parts = [torch.from_numpy(sample[name]) for sample in samples]
        batch[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def decode(sample: dict[str, Any]) -> dict[str, Any]:
    """What `shards.read_sample` makes of a sample's files."""
    audio, _ = soundfile.read(io.BytesIO(sample["wav"]), dtype="float32")
    vision = np.load(io.BytesIO(sample["vision.npy"]), allow_pickle=False)
    return {"audio": audio, "vision": vision, "text": sample["txt"].decode(), "label": 0.0}


def plain(folder: Path, workers: int) -> Iterable[Any]:
    """webdataset's own pipeline."""
    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).map(decode).batched(BATCH, collation_fn=collate)
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def ours(folder: Path, workers: int, window: Window | None = None) -> Iterable[Any]:
    """An epoch of ours, the opening of the split included."""
    split = ShardedSplit(folder, "train")
    return stream(split, EpochPlan(len(split), BATCH, 1, 1, SEED, 0, window=window), 0, collate, workers=workers)


def rate(batches: Iterable[Any], clips: int, started: float) -> float:
    """Clips per second from `started` to the end; all must come."""
    assert sum(len(batch["text"]) for batch in batches) == clips
    return clips / (time.perf_counter() - started)


def warm(folder: Path, clips: int, rounds: int) -> None:
    """Ours against plain webdataset."""
    for side in (plain, ours):
        rate(side(folder, 1), clips, 0.0)  # brings the files into the page cache
    print("\n| round | ours, clips/s | webdataset, clips/s | ratio |\n|---|---|---|---|")
    ratios = []
    for one in range(rounds):
        found = {}
        for side in (ours, plain) if one % 2 else (plain, ours):
            started = time.perf_counter()
            found[side] = rate(side(folder, 1), clips, started)
        ratios.append(found[ours] / found[plain])
        print(f"| {one} | {found[ours]:.0f} | {found[plain]:.0f} | {ratios[-1]:.2f} |", flush=True)
    print(f"\nratio, median of rounds: {np.median(ratios):.2f}")


def cold(folder: Path, clips: int, rounds: int, iops: int | None) -> None:
    """The windowed against the global order."""
    orders = {"global": None, "windowed": Window(min(1024, clips), 128)}
    if iops:
        limit_reads(folder, iops)
    print("\n| round | order | clips/s | MB from the disk | of the tars |\n|---|---|---|---|---|")
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    found: dict[str, list[float]] = {name: [] for name in orders}
    for one in range(rounds):
        for name in list(orders)[:: -1 if one % 2 else 1]:
            drop(folder)
            before, started = bytes_read(), time.perf_counter()
            found[name].append(rate(ours(folder, 0, orders[name]), clips, started))
            read = bytes_read() - before
            print(f"| {one} | {name} | {found[name][-1]:.0f} | {read / 1e6:.0f} | {read / size:.2f} |", flush=True)
    ratios = np.array(found["windowed"]) / np.array(found["global"])
    print(f"\nwindowed over global, median of rounds: {np.median(ratios):.2f}")
    if iops:
        release()
    print("\n| order | jumps per 1,000 clips | two of a batch in one block | displacement |\n|---|---|---|---|")
    split = ShardedSplit(folder, "train")
    for name, window in orders.items():
        plan = EpochPlan(clips, BATCH, 1, 1, SEED, 0, window=window)
        groups = [plan.order[i : i + window.samples] for i in range(0, clips, window.samples)] if window else None
        jumps = clips if groups is None else sum(len(r) for g in groups for _, r in byte_ranges(split.columns, g))
        together, apart = randomness(plan.order)
        print(f"| {name} | {1000 * jumps / clips:.0f} | {together:.1f} × uniform | {apart:.2f} × uniform |")


def randomness(order: np.ndarray, block: int = 128) -> tuple[float, float]:
    """Share of pairs in a batch that are of one block, and mean |place in the epoch - place by key|, over uniform's."""
    n = len(order)
    batches = order[: n // BATCH * BATCH].reshape(-1, BATCH) // block
    same = (batches[:, :, None] == batches[:, None, :]).sum() - batches.size
    together = same / (batches.size * (BATCH - 1)) / ((block - 1) / (n - 1))
    return float(together), float(np.abs(order - np.arange(n)).mean() / (n / 3))


def drop(folder: Path) -> None:
    """Takes the tars out of the page cache."""
    for path in folder.glob("*.tar"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    """From storage, by this process so far."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def limit_reads(folder: Path, iops: int) -> None:
    """Lets the disk of `folder` answer this process so many reads per second."""
    device = folder.stat().st_dev
    CGROUP.mkdir(exist_ok=True)
    (CGROUP / "blkio.throttle.read_iops_device").write_text(f"{os.major(device)}:{os.minor(device)} {iops}\n")
    (CGROUP / "cgroup.procs").write_text(str(os.getpid()))


def release() -> None:
    """Leaves the cgroup and removes it."""
    (CGROUP.parent / "cgroup.procs").write_text(str(os.getpid()))
    CGROUP.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming"))
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--iops", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = arguments.folder / f"shards-{arguments.clips}"
    if not root.exists():
        write(root, arguments.clips)
    size = sum(path.stat().st_size for path in root.glob("*.tar"))
    print(f"{arguments.clips} clips, {size / 1e6:.0f} MB, {size / arguments.clips / 1e3:.0f} kB per clip")
    if arguments.cold:
        cold(root, arguments.clips, arguments.rounds, arguments.iops)
    else:
        warm(root, arguments.clips, arguments.rounds)


if __name__ == "__main__":
    main()
