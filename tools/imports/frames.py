"""Pictures of films as features: each frame through an image encoder of transformers."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sharding.errors import UserError
from tools.imports.media import frames_of
from tools.imports.packages import need
from tools.manifest import FILM_SUFFIXES, Manifest, Row
from tools.sources import Features, Film, Media

if TYPE_CHECKING:
    import torch

BATCH = 16  # frames that pass through the encoder together
WHERE = "--vision-encoder"


@dataclass(frozen=True)
class FrameEncoder:
    """An image encoder, and how many frames of each second it sees; made by `load_encoder`."""

    name: str
    rate: float  # frames per second
    width: int


@dataclass(frozen=True)
class Frames(Features):
    """Features of a film's pictures: one vector per frame, the mean of the encoder's last hidden state over places."""

    film: Media
    encoder: FrameEncoder

    @property
    def width(self) -> int | None:
        return self.encoder.width

    def read(self) -> np.ndarray:
        with self.film.open() as file:
            frames = frames_of(file, self.encoder.rate)
            found = [encode(self.encoder.name, batch) for batch in _batches(frames)]
        if not found:
            raise ValueError("has no pictures")
        return np.concatenate(found)

    def __str__(self) -> str:
        return f"{self.film}, pictures"


def load_encoder(name: str | None, rate: float | None) -> FrameEncoder | None:
    """The encoder that the options name; None where they name none.

    Args:
        name: local folder or hub id.
        rate: frames per second.

    Raises:
        UserError: one option without the other, or a model that cannot be loaded or takes no images.
    """
    if name is None:
        if rate is not None:
            remedy = f"Add {WHERE} PATH, an image encoder of transformers: vision in the shards is features [T, D]"
            raise UserError("--frames-per-second", "is given, and nothing to make features of the frames", remedy)
        return None
    if rate is None or not 0 < rate <= 1000:
        raise UserError(WHERE, "needs frames per second", "Add --frames-per-second, e.g. 5")
    name = os.path.abspath(name) if Path(name).is_dir() else name  # noqa: PTH100 (resolve would follow links)
    return FrameEncoder(name, rate, encode(name, [np.zeros((64, 64, 3), np.uint8)]).shape[1])


def with_frames(table: Manifest, encoder: FrameEncoder | None) -> Manifest:
    """The table with pictures as vision where a row has a film and no vision; or a remark that they are not taken."""
    films = sum(film_of(row) is not None for row in table.rows)
    if not films:
        return table
    need("av", "decoding films")  # before every film fails of it
    if encoder is None:
        remark = f"{films} clips are films, of which the sound track alone is taken (pictures: {WHERE})"
        return replace(table, remarks=[*table.remarks, remark])
    rows = []
    for row in table.rows:
        film = film_of(row)
        rows.append(row if film is None else replace(row, vision=Frames(film, encoder)))
    remark = f"{films} clips: vision is {encoder.rate:g} frames per second, each a vector of {encoder.name}"
    return replace(table, rows=rows, remarks=[*table.remarks, remark])


def film_of(row: Row) -> Media | None:
    """The film whose pictures can be the row's vision; None where it has none, or has vision."""
    if row.vision is not None:
        return None
    if isinstance(row.audio, Path):
        return Film(row.audio) if row.audio.suffix.lower() in FILM_SUFFIXES else None
    return row.audio if isinstance(row.audio, Media) and row.audio.is_film else None


def _batches(frames: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    while batch := list(itertools.islice(frames, BATCH)):
        yield batch


def encode(name: str, images: list[np.ndarray]) -> np.ndarray:
    """One vector per image.

    Args:
        name: of the encoder.
        images: uint8 [height, width, 3] each.

    Returns:
        float32 [images, width]: the mean of the last hidden state over tokens (or over the places of a map). No pooler
        is used: of many published models it is random.

    Raises:
        UserError: the encoder cannot be loaded, or takes no images.
    """
    import torch  # noqa: PLC0415 (seconds of loading, which other importers do without)

    processor, model = _load(name)
    try:
        with torch.inference_mode():
            pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
            last: torch.Tensor = model(pixel_values=pixels).last_hidden_state
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(WHERE, f"{name!r} makes no features of images ({reason})", "Name an image encoder") from None
    vectors = last.flatten(2).mean(dim=2) if last.ndim == 4 else last.mean(dim=1)
    return vectors.float().cpu().numpy()


@functools.lru_cache(maxsize=1)
def _load(name: str) -> tuple[Any, Any]:
    import torch  # noqa: PLC0415
    from transformers import AutoImageProcessor, AutoModel, logging  # noqa: PLC0415

    from dist_train.pretrained import LOAD_ERRORS, cannot_load, load_model  # noqa: PLC0415

    logging.set_verbosity_error()  # of heads and poolers that are not used
    logging.disable_progress_bar()
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # one of many workers
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise cannot_load(WHERE, name, error) from None
    model: Any = load_model(AutoModel, WHERE, name, dtype=torch.float32, unused="pooler.")
    model = getattr(model, "vision_model", model)  # of CLIP and the like
    return processor, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
