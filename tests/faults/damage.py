"""Damage to a checkpoint on disk, by the kind of bytes that are hit."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from sharding.portable import MANIFEST, STATE


def weights(directory: Path, dice: random.Random) -> Path:
    """One of the files with tensors."""
    return dice.choice(sorted(directory.glob("*.safetensors")))


def flip(path: Path, position: int) -> None:
    """Inverts one byte."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 0xFF]))


def header(path: Path) -> int:
    """Bytes of the header of a safetensors file, behind the 8 of its length."""
    with path.open("rb") as file:
        return struct.unpack("<Q", file.read(8))[0]


def length_of_header(directory: Path, dice: random.Random) -> None:
    flip(weights(directory, dice), dice.randrange(8))


def in_header(directory: Path, dice: random.Random) -> None:
    path = weights(directory, dice)
    flip(path, 8 + dice.randrange(header(path)))


def in_tensors(directory: Path, dice: random.Random) -> None:
    path = weights(directory, dice)
    flip(path, dice.randrange(8 + header(path), path.stat().st_size))


def truncated(directory: Path, dice: random.Random) -> None:
    path = dice.choice([weights(directory, dice), directory / STATE, directory / MANIFEST])
    with path.open("r+b") as file:
        file.truncate(dice.randrange(path.stat().st_size))


def longer(directory: Path, dice: random.Random) -> None:
    with weights(directory, dice).open("ab") as file:
        file.write(dice.randbytes(dice.randint(1, 100)))


def missing(directory: Path, dice: random.Random) -> None:
    dice.choice([weights(directory, dice), directory / STATE, directory / MANIFEST]).unlink()


def exchanged(directory: Path, dice: random.Random) -> None:
    """A part takes the place of another."""
    first, second = dice.sample(sorted(directory.glob("*.safetensors")), 2)
    shutil.copyfile(first, second)


def in_state(directory: Path, dice: random.Random) -> None:
    flip(directory / STATE, dice.randrange((directory / STATE).stat().st_size))


def in_manifest(directory: Path, dice: random.Random) -> None:
    """A digit of a checksum."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    entry = manifest["files"][dice.choice(sorted(manifest["files"]))]
    entry["sha256"] = ("0" if entry["sha256"][0] != "0" else "1") + entry["sha256"][1:]
    path.write_text(json.dumps(manifest))


def gone(directory: Path, dice: random.Random) -> None:
    """The pointer `last` then points nowhere."""
    shutil.rmtree(directory)


KINDS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(length_of_header, in_header, in_tensors, truncated, longer),
    *(missing, exchanged, in_state, in_manifest, gone),
)
