"""Where an array of a sample comes from when it is no file of its own: memory, a part of a file, a film.

Sources are frozen dataclasses: they cross to the process that prepares the sample, and are read there. Their `str` is
their name in messages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np


class Features(ABC):
    """Features of a clip, [T, D]."""

    @property
    @abstractmethod
    def width(self) -> int | None:
        """D, told without reading the features; None: not known."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """The numbers, of any real type.

        Raises:
            ValueError: what is wrong with them, as what follows their name.
            OSError: they cannot be read.
        """


class Media(ABC):
    """A sound, or a film with a sound track."""

    @property
    @abstractmethod
    def is_film(self) -> bool:
        """Whether it may have pictures, too."""

    @abstractmethod
    def open(self) -> BinaryIO:
        """Its bytes, seekable.

        Raises:
            ValueError, OSError: see `Features.read`.
        """


@dataclass(frozen=True)
class Held(Features):
    """Features in memory."""

    name: str
    array: np.ndarray

    @property
    def width(self) -> int | None:
        return self.array.shape[1] if self.array.ndim == 2 and self.array.shape[1] else None

    def read(self) -> np.ndarray:
        if self.array.dtype.kind not in "fiu":
            raise ValueError(f"has type {self.array.dtype}, which is not real numbers")
        return self.array

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Film(Media):
    """A film in a file of its own."""

    path: Path
    is_film = True

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def __str__(self) -> str:
        return str(self.path)
