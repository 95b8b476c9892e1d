"""Where features go: a hidden directory beside OUT that is continued until all is there, then OUT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_train.features import differences
from sharding.dataset_file import finish_dataset, write_synced
from sharding.errors import UserError, UserErrors
from sharding.shard_writer import PackedSample, refuse_existing, tar_name, write_error, write_shard
from sharding.shards import DatasetInfo, Dims, SetAside, ShardIndex, Split, load_info

IDENTITY = "features.json"
LAYOUT = "samples_per_shard"  # beside the identity: what is made must fit together


@dataclass(frozen=True)
class Piece:
    """A tar to be made: these clips of a split, by their positions in key order."""

    split: Split
    number: int
    clips: range

    @property
    def tar(self) -> str:
        """Its name."""
        return tar_name(self.split, self.number)

    @property
    def mark(self) -> str:
        """Name of the file that is written when it is there; also of one none of whose clips was usable."""
        return f"{self.tar}.done.json"


class Extraction:
    """An extraction on the disk.

    Args:
        out: where the dataset goes.
        samples_per_shard: clips of a tar.
    """

    def __init__(self, out: Path, samples_per_shard: int) -> None:
        self.out, self.samples_per_shard = out, samples_per_shard
        self.partial = out.parent / f".{out.name}.extracting"
        self.logs = self.partial / "logs"

    def check(self, asked: Mapping[str, Any]) -> None:
        """Refuses to go on with features, or over a dataset, that would be other ones.

        Args:
            asked: identity of what is to be extracted, or some of its entries.

        Raises:
            UserError: OUT holds something else.
            UserErrors: each entry that differs.
        """
        if (self.out / "dataset.json").is_file() and load_info(self.out).features is not None:
            found, place = load_info(self.out).features, self.out
            remedy = "Name a new directory, or remove this one first."
        else:
            refuse_existing(self.out)
            if not (self.partial / IDENTITY).is_file():
                return
            found, place = self.known, self.partial
            remedy = f"Finish it with its own settings, or remove {self.partial}."
            asked = {**asked, LAYOUT: self.samples_per_shard}
        wrong = differences(asked, found, "features", str(place), remedy)
        if wrong:
            raise UserErrors(wrong)

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Makes the directory, or opens it. Returns whether OUT is there, with just these features.

        Raises:
            UserError, UserErrors: see `check`; or the place cannot be written.
        """
        self.check(identity)
        if self.out.exists():
            return True
        if (self.partial / "dataset.json").is_file():  # all but its name was there
            with suppress(UserError):
                if load_info(self.partial).features == identity:
                    self.seal()
                    return True
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            record = {**identity, LAYOUT: self.samples_per_shard}
            write_synced(self.partial / IDENTITY, json.dumps(record, indent=1))
        except OSError as error:
            raise write_error(self.out, error) from error
        return False

    @cached_property
    def known(self) -> dict[str, Any] | None:
        """The identity of what was begun."""
        try:
            found = json.loads((self.partial / IDENTITY).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def check_shared(self) -> None:
        """Refuses ranks that do not see the directory of rank 0.

        Raises:
            UserError: this one does not.
        """
        if not (self.partial / IDENTITY).is_file():
            raise UserError(str(self.out), "is on no file system that all ranks share", "Name a shared directory.")

    def marked(self, piece: Piece) -> bool:
        """Whether it was finished."""
        return (self.partial / piece.mark).is_file()

    def has(self, piece: Piece) -> bool:
        """Whether it was finished, and its files are whole."""
        try:
            samples = json.loads((self.partial / piece.mark).read_bytes())["samples"]
            return samples == 0 or (self.partial / piece.tar).stat().st_size == self.index(piece).bytes
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def index(self, piece: Piece) -> ShardIndex:
        """Of a finished tar."""
        return ShardIndex.model_validate_json((self.partial / f"{piece.tar}.index.json").read_bytes())

    def write(self, piece: Piece, samples: Sequence[PackedSample], aside: Sequence[SetAside]) -> None:
        """Writes a tar, its index and its mark.

        Raises:
            UserError: the disk refuses it.
        """
        record = {"samples": len(samples), "set_aside": [one.model_dump() for one in aside]}
        try:
            if samples:
                write_shard(self.partial, piece.split, piece.number, samples)
            write_synced(self.partial / piece.mark, json.dumps(record))
        except OSError as error:
            told = write_error(self.out, error)
            raise UserError(
                told.where, told.problem, f"What is finished lies in {self.partial}; go on there"
            ) from error

    def finish(
        self,
        pieces: Sequence[Piece],
        dims: Dims,
        *,
        label_range: tuple[float, float],
        features: dict[str, Any],
        classes: list[str] | None = None,
    ) -> DatasetInfo:
        """Writes what belongs to the tars, and gives the directory its name.

        Args:
            dims: widths of what there may be.

        Raises:
            UserError: no clip was usable, or the disk refuses it.
        """
        indexes: dict[Split, list[ShardIndex]] = {}
        aside: list[SetAside] = []
        for piece in pieces:
            record = json.loads((self.partial / piece.mark).read_bytes())
            aside += [SetAside(**one) for one in record["set_aside"]]
            if record["samples"]:
                indexes.setdefault(piece.split, []).append(self.index(piece))
        if not indexes:
            raise UserError(str(self.out), f"gets no clip: {aside[0].reason}", "Raise the limit that is named.")
        columns = {"audio": "audio_frames", "text": "text_frames", "simulated": "simulated_frames"}
        every = [index.columns for found in indexes.values() for index in found]
        absent = [name for name, column in columns.items() if all(n is None for c in every for n in getattr(c, column))]
        try:
            info = finish_dataset(
                self.partial,
                indexes,
                dims=dims.model_copy(update=dict.fromkeys(absent)),
                label_range=label_range,
                set_aside=aside,
                features=features,
                classes=classes,
            )
            self.seal()
        except OSError as error:
            raise write_error(self.out, error) from error
        return info

    def seal(self) -> None:
        """Takes away what only the making needed, and gives the directory its name."""
        shutil.rmtree(self.logs, ignore_errors=True)
        # Names with a dot in front: of a tar in whose middle somebody was killed.
        for path in (*self.partial.glob("*.done.json"), *self.partial.glob(".*"), self.partial / IDENTITY):
            path.unlink()
        self.partial.rename(self.out)

    def discard_unstarted(self) -> None:
        """Removes the directory again if nothing was begun in it."""
        if not (self.partial / IDENTITY).is_file():
            shutil.rmtree(self.logs, ignore_errors=True)
            with suppress(OSError):
                self.partial.rmdir()
