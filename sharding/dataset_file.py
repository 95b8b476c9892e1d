"""Writes dataset.json and the columns of each split: what belongs to tars and indexes that are there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sharding.shards import (
    SPLITS,
    Columns,
    DatasetInfo,
    Dims,
    LabelStatistics,
    SetAside,
    ShardEntry,
    ShardIndex,
    Split,
    SplitInfo,
    content_hash,
)
from sharding.table import write_columns


def finish_dataset(
    directory: Path,
    indexes: Mapping[Split, Sequence[ShardIndex]],
    *,
    dims: Dims,
    label_range: tuple[float, float],
    set_aside: list[SetAside],
    features: dict[str, Any] | None = None,
    classes: list[str] | None = None,
) -> DatasetInfo:
    """Writes what belongs to tars and indexes that are there: the columns of each split, and dataset.json.

    Args:
        features, classes: see `DatasetInfo`.

    Raises:
        OSError: the disk refuses it.
    """
    for split, found in indexes.items():
        write_columns(directory, split, found)
    info = DatasetInfo(
        splits={
            split: _split_info(found, label_range, classes) for split, found in sorted(indexes.items(), key=_place)
        },
        dims=dims,
        label_range=label_range,
        set_aside=set_aside,
        content_hash=content_hash(
            (split, *pair)
            for split, found in indexes.items()
            for index in found
            for pair in zip(index.columns.key, index.columns.sha256, strict=True)
        ),
        features=features,
        classes=classes,
    )
    write_synced(directory / "dataset.json", info.model_dump_json(indent=1))
    return info


def _place(split: tuple[str, Any]) -> int:
    return SPLITS.index(split[0])


def _split_info(
    indexes: Sequence[ShardIndex], label_range: tuple[float, float], classes: list[str] | None
) -> SplitInfo:
    c = {name: [v for x in indexes for v in getattr(x.columns, name)] for name in Columns.model_fields}
    audio = zip(c["audio_seconds"], c["audio_frames"], strict=True)
    text = zip(c["text_characters"], c["text_frames"], strict=True)
    return SplitInfo(
        shards=[ShardEntry(file=x.tar, samples=len(x.columns.key), bytes=x.bytes, sha256=x.sha256) for x in indexes],
        samples=len(c["key"]),
        seconds=sum(s or 0.0 for s in c["audio_seconds"]),
        labels=_label_statistics(c["label"], label_range, classes),
        missing={
            "audio": sum(pair == (None, None) for pair in audio),
            "text": sum(pair == (None, None) for pair in text),
            "vision": sum(frames is None for frames in c["vision_frames"]),
        },
    )


def _label_statistics(
    labels: list[float], label_range: tuple[float, float], classes: list[str] | None
) -> LabelStatistics:
    bins = 12 if classes is None else len(classes)
    counts, edges = np.histogram(labels, bins, label_range if classes is None else (-0.5, bins - 0.5))
    return LabelStatistics(
        min=min(labels),
        max=max(labels),
        mean=float(np.mean(labels)),
        median=float(np.median(labels)),
        edges=edges.tolist(),
        counts=counts.tolist(),
    )


def write_synced(path: Path, text: str) -> None:
    """Writes a file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
