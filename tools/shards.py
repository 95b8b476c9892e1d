"""`dist-train shards`: make a corpus of tars from a manifest, look into it, verify it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dist_train.keys import flat
from sharding.errors import UserError, UserErrors, plain
from sharding.shard_writer import lengths, write_dataset
from sharding.shards import (
    REMAKE,
    Dataset,
    DatasetInfo,
    Dims,
    SetAside,
    ShardIndex,
    content_hash,
    load_dataset,
    load_index,
    load_info,
    read_sample,
)
from sharding.signals import interrupt_blocked
from sharding.table import LENGTHS, columns_path, read_columns, table_of
from tools.imports.frames import FrameEncoder, with_frames
from tools.manifest import Manifest, Row, capped, check_classes, check_label_range, read_manifest
from tools.progress import progress_bar
from tools.samples import Prepared, find_dims, prepare

SCALE_CLIPS, UNEQUAL = 64, 100  # clips looked at, and the ratio of column spreads that is remarked
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_DONE = {
    "resampled": "audio files resampled to 16 kHz",
    "mixed to mono": "audio files averaged to mono",
    "clipped": "audio files clipped to [-1, 1]",
    "filled": "arrays of features held NaN or infinite values, which are 0 now",
}


@dataclass(frozen=True)
class Making:
    """How shards are made.

    Args:
        workers: processes that decode and encode samples; the bytes do not depend on them.
        samples_per_shard: samples in a tar.
        on_bad_sample: "stop" names every bad sample and keeps nothing; "set_aside" leaves them out and lists them in
            dataset.json.
        label_range: smallest and largest label allowed.
        classes: names, where labels are classes; then `label_range` plays no part.
        fill_non_finite: write 0 where features are NaN or infinite, which makes a bad sample otherwise.
    """

    workers: int
    samples_per_shard: int
    on_bad_sample: str
    label_range: tuple[float, float]
    fill_non_finite: bool = False
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in {"workers": self.workers, "samples per shard": self.samples_per_shard}.items():
            if value < 1:
                raise UserError(name, f"{value} is too few", "Use at least 1")
        if self.on_bad_sample not in ("stop", "set_aside"):
            raise UserError("on-bad-sample", f"{self.on_bad_sample!r} is unknown", "Use stop or set_aside")
        check_classes(self.classes)
        check_label_range(self.labels_within)

    @property
    def labels_within(self) -> tuple[float, float]:
        """Smallest and largest number that a label is stored as."""
        return (0.0, len(self.classes) - 1.0) if self.classes else self.label_range


def make(manifest: Path, out: Path, making: Making, *, encoder: FrameEncoder | None = None) -> None:
    """Build `out` from a manifest.

    Args:
        manifest: CSV or JSONL, see `manifest.read_manifest`.
        out: new directory.
        making: how.
        encoder: of the frames of films, for clips without vision.

    Raises:
        UserError, UserErrors: bad manifest, samples or disk; then `out` does not exist.
    """
    table = read_manifest(manifest, making.label_range, making.classes)
    write(with_frames(table, encoder), out, making, str(manifest))


def write(table: Manifest, out: Path, making: Making, where: str) -> None:
    """Prepare the rows of a table and write them as shards.

    Samples are written in key order: neighbours in the order that training starts from are then neighbours on the disk.

    Args:
        table: rows with keys that differ.
        out: new directory.
        making: how.
        where: the table's name, for messages.

    Raises:
        UserError, UserErrors: bad samples or disk; then `out` does not exist.
    """
    stop = making.on_bad_sample == "stop"
    if table.problems and (stop or not table.rows):
        raise UserErrors(capped([error for _, error in table.problems], where))
    dims = find_dims(table.rows)
    done: dict[str, list[str]] = {name: [] for name in _DONE}
    failed: dict[str, UserError] = {}
    rows = sorted(table.rows, key=lambda row: row.key)
    with (
        write_dataset(
            out,
            dims=dims,
            label_range=making.labels_within,
            samples_per_shard=making.samples_per_shard,
            classes=list(making.classes) or None,
        ) as writer,
        progress_bar() as progress,
        closing(_prepare_all(rows, dims, making)) as results,
    ):
        for row, result in zip(rows, progress.track(results, total=len(rows), description="samples"), strict=True):
            if isinstance(result, UserError):
                failed[row.key] = result
            elif not failed or not stop:
                writer.add(row.split, result.sample)
                for name in result.done:
                    done[name].append(row.key)
        by_key = [(row.key, failed[row.key]) for row in table.rows if row.key in failed]  # told in the table's order
        if by_key and (stop or len(by_key) == len(rows)):
            raise UserErrors(capped([error for _, error in by_key], where))
        bad = table.problems + by_key
        writer.set_aside += [SetAside(key=key, reason=f"{one.where}: {one.problem}") for key, one in bad]
        if table.record is not None:
            aside = [{"key": key, "reason": str(error)} for key, error in bad]
            record = {**table.record, "filled": done["filled"], "set_aside": aside}
            writer.attach("import.json", json.dumps(record, indent=1))
    _report(out, table, Counter({name: len(keys) for name, keys in done.items()}), [error for _, error in bad])


def inspect(directory: Path, *, as_json: bool) -> None:
    """Print counts, hours, lengths, labels, missing modalities and a few samples of a shard directory.

    Raises:
        UserError, UserErrors: it is not one, or it is damaged.
    """
    dataset = load_dataset(directory)
    summary = _summary(dataset)
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    console = Console()
    info = dataset.info
    widths = ", ".join(f"{name} {width}" for name, width in info.dims if width is not None)
    print(f"{directory}: {widths}; content {info.content_hash[:12]}")
    console.print(_split_table(info))
    plot = Column("distribution", no_wrap=True)
    lengths = Table("split", "length", "clips", *(f"{q:.0%}" for q in QUANTILES), plot, title="Lengths")
    labels = Table("split", "min", "median", "mean", "max", plot.copy(), title="Labels")
    if info.classes is not None:
        labels = Table("class", *dataset.indexes, title="Clips of each class")
        counts = [
            Counter(label for one in indexes for label in one.columns.label) for indexes in dataset.indexes.values()
        ]
        for place, name in enumerate(info.classes):
            labels.add_row(name, *(str(found[place]) for found in counts))
    for split, part in summary["splits"].items():
        for name, found in part["lengths"].items():
            numbers = [f"{value:.4g}" for value in found["quantiles"].values()]
            lengths.add_row(split, name.replace("_", " "), str(found["clips"]), *numbers, bars(found["counts"]))
        found = part["labels"]
        if info.classes is None:
            numbers = [f"{found[name]:.3f}" for name in ("min", "median", "mean", "max")]
            labels.add_row(split, *numbers, bars(found["counts"]))
    console.print(lengths, labels)
    if info.features is not None:
        print(f"features made with {', '.join(f'{key} {_short(value)}' for key, value in flat(info.features).items())}")
    examples = Table("split", "key", "label", "audio", "text", "vision", title="First samples")
    for sample in summary["samples"]:
        known = dict(enumerate(info.classes or ()))
        told = {**sample, "label": known.get(sample["label"], sample["label"])}
        examples.add_row(*(_short(value) for value in told.values()))
    console.print(examples)
    for note in summary["notes"]:
        print(note)
    if info.set_aside:
        print(f"{len(info.set_aside)} samples set aside when the shards were made, e.g.")
        for aside in info.set_aside[:3]:
            print(f"  {plain(aside.reason)}")


def verify(directory: Path) -> None:
    """Check every tar and sample against its checksum, decode everything, and compare with dataset.json.

    Raises:
        UserError: not a shard directory.
        UserErrors: every bad tar and sample.
    """
    info = load_info(directory)
    errors: list[UserError] = []
    triples: list[tuple[str, str, str]] = []
    indexes: dict[str, list[ShardIndex]] = {}
    with progress_bar() as progress:
        task = progress.add_task("verify", total=sum(part.samples for part in info.splits.values()))
        for split, part in info.splits.items():
            for entry in part.shards:
                try:
                    index = load_index(directory, split, entry)
                    indexes.setdefault(split, []).append(index)
                    errors += _verify_tar(directory, index, info.dims)
                    columns = index.columns
                    errors += _no_classes(directory, index, info)
                    triples += [(split, *pair) for pair in zip(columns.key, columns.sha256, strict=True)]
                except UserError as error:
                    errors.append(error)
                progress.advance(task, entry.samples)
    if not errors and content_hash(triples) != info.content_hash:
        errors.append(UserError(str(directory / "dataset.json"), "content_hash differs from the indexes", REMAKE))
    for split, part in info.splits.items() if not errors else ():
        path = columns_path(directory, split)
        kept = read_columns(directory, split, part)
        if path.exists() and (kept is None or not kept.equals(table_of(directory, indexes[split]))):
            remedy = "Remove it: opening just takes longer"
            errors.append(UserError(str(path), "is damaged or of other indexes", remedy))
    if errors:
        raise UserErrors(errors)
    print(f"{directory}: {len(triples)} samples, every checksum is right")


def _no_classes(directory: Path, index: ShardIndex, info: DatasetInfo) -> list[UserError]:
    """Clips whose label is no class, where labels are classes."""
    columns, places = index.columns, range(len(info.classes or ()))
    return [
        UserError(f"{directory / index.tar}, {key}", f"has the label {label:g}, which is no class", REMAKE)
        for key, label in zip(columns.key, columns.label, strict=True)
        if info.classes is not None and label not in places
    ]


def bars(counts: list[int]) -> str:
    """A histogram as one line of block characters."""
    top = max(counts, default=0)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // top)] if top else " " for count in counts)


def _prepare_all(rows: list[Row], dims: Dims, making: Making) -> Generator[Prepared | UserError]:
    """The prepared rows in order; at most a few per worker are held in memory."""
    workers, fill = making.workers, making.fill_non_finite
    if workers == 1:
        yield from (prepare(row, dims, fill) for row in rows)
        return
    # Spawned, not forked: the progress bar runs a thread.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    waiting: deque[Future[Prepared | UserError]] = deque()
    try:
        for row in rows:
            with interrupt_blocked():  # submitting starts workers
                waiting.append(pool.submit(prepare, row, dims, fill))
            if len(waiting) == 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("workers", "a worker process died, perhaps of memory", "Use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _report(out: Path, table: Manifest, done: Counter[str], bad: list[UserError]) -> None:
    Console().print(_split_table(load_info(out)))
    for name, text in _DONE.items():
        if done[name]:
            print(f"{done[name]} {text}")
    for remark in table.remarks:
        print(plain(remark))
    remarks = {"long texts": table.notes, "samples set aside (all in dataset.json)": [str(error) for error in bad]}
    for title, lines in remarks.items():
        if lines:
            print(f"{len(lines)} {title}:")
            for line in lines[:5]:
                print(f"  {line}")
    for note in _scale_notes(load_dataset(out)):
        print(note)
    print(f"Written to {out}")


def _split_table(info: DatasetInfo) -> Table:
    table = Table("split", "clips", "hours", "tars", "MB", "no audio", "no text", "no vision", title="Shards")
    for split, part in info.splits.items():
        size = sum(entry.bytes for entry in part.shards) / 1e6
        cells = (part.samples, f"{part.seconds / 3600:.3f}", len(part.shards), f"{size:.1f}", *part.missing.values())
        table.add_row(split, *map(str, cells))
    return table


def _summary(dataset: Dataset) -> dict[str, Any]:
    summary = dataset.info.model_dump()
    summary["samples"], summary["notes"] = [], _scale_notes(dataset) + _order_notes(dataset)
    for split, indexes in dataset.indexes.items():
        lengths: dict[str, Any] = {}
        for name in LENGTHS:
            values = [v for index in indexes for v in getattr(index.columns, name) if v is not None]
            if values:
                counts, edges = np.histogram(values, bins=12)
                quantiles = dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True))
                lengths[name] = {"clips": len(values), "quantiles": quantiles}
                lengths[name] |= {"edges": edges.tolist(), "counts": counts.tolist()}
        summary["splits"][split]["lengths"] = lengths
        summary["samples"] += _first_samples(dataset, indexes[0], 2)
    return summary


def _first_samples(dataset: Dataset, index: ShardIndex, count: int) -> list[dict[str, Any]]:
    rows = []
    for row, sample in list(_read_tar(dataset.root, index, dataset.info.dims, count)):
        if isinstance(sample, UserError):
            raise sample
        shapes = {name: None if sample[name] is None else list(sample[name].shape) for name in ("audio", "vision")}
        features = sample["text_features"]
        text = sample["text"] if features is None else list(features.shape)
        rows.append({"split": index.split, "key": row["key"], "label": row["label"]})
        rows[-1] |= {"audio": shapes["audio"], "text": text, "vision": shapes["vision"]}
    return rows


def _scale_notes(dataset: Dataset) -> list[str]:
    """Features whose columns differ more than hundredfold in spread: nothing later brings them to one scale."""
    notes, indexes, dims = [], next(iter(dataset.indexes.values())), dataset.info.dims
    rows = [sample for _, sample in _read_tar(dataset.root, indexes[0], dims, SCALE_CLIPS)]
    for name in ("audio", "text_features", "simulated", "vision"):
        found = [row[name] for row in rows if not isinstance(row, UserError) and row[name] is not None]
        if not found or found[0].ndim == 1:
            continue
        spread = np.concatenate(found).std(axis=0, dtype=np.float64)
        spread = spread[spread > 0]
        if len(spread) and spread.max() > UNEQUAL * spread.min():
            notes.append(
                f"The columns of {name} are of very different scale (standard deviations {spread.min():.2g} to "
                f"{spread.max():.2g}): standardise them over the training clips, or the large ones drown the small"
            )
    return notes


def _order_notes(dataset: Dataset) -> list[str]:
    """Splits whose windows would be scattered over the tars."""
    scattered = [name for name, found in dataset.indexes.items() if not table_of(dataset.root, found).in_order]
    if not scattered:
        return []
    return [f"The tars of {', '.join(scattered)} are not in key order: data.shuffle: windowed would read at random"]


def _read_tar(
    root: Path, index: ShardIndex, dims: Dims, count: int | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | UserError]]:
    """Index row and decoded sample (or what is wrong with it) of the first `count` samples of a tar."""
    columns, tar = index.columns, root / index.tar
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for i in range(len(columns.key))[:count]:
            row = {name: getattr(columns, name)[i] for name in ("key", "offset", "size", "sha256")}
            try:
                sample: dict[str, Any] | UserError = read_sample(descriptor, str(tar), dims, **row)
            except UserError as error:
                sample = error
            yield row | {"label": columns.label[i]}, sample
    finally:
        os.close(descriptor)


def _verify_tar(root: Path, index: ShardIndex, dims: Dims) -> list[UserError]:
    tar = root / index.tar
    try:
        errors = []
        for i, (row, found) in enumerate(_read_tar(root, index, dims)):
            problem = found if isinstance(found, UserError) else _wrong_length(tar, index, i, row["key"], found)
            errors += [] if problem is None else [problem]
        with tar.open("rb") as stream:
            whole = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return [UserError(str(tar), f"cannot be read ({error.strerror})", "Check the permissions")]
    if whole != index.sha256 and not errors:
        errors.append(UserError(str(tar), "bytes between the samples differ from its checksum", REMAKE))
    return errors


def _wrong_length(tar: Path, index: ShardIndex, i: int, key: str, sample: dict[str, Any]) -> UserError | None:
    """What the index says wrongly of a sample's lengths, by which steps are planned."""
    for name, length in lengths(**sample).items():
        said = getattr(index.columns, name)[i]
        if said != length:
            return UserError(f"{tar}, sample {key}", f"has {name} {length}, its index says {said}", REMAKE)
    return None


def _short(value: Any) -> str:
    text = "–" if value is None else f"{value:+.2f}" if isinstance(value, float) else str(value)
    return escape(plain(text if len(text) <= 60 else text[:59] + "…"))
