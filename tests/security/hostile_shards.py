"""Hostile shards: members, arrays and sounds inside tars whose checksums are right; indexes that lie."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.security import forge
from tests.security.attempt import CANARY, Words
from tests.security.case import Case
from tests.security.forge import INDEX, TAR, member, npy, pax

HUGE = b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7  # a size field in base 256
NEGATIVE = b"\xff" * 10 + b"\xfc\x00"  # -1024 in base 256
BELL = "\x1b[2J\x07"  # would clear the terminal that it is printed on


def sample(make: Callable[[Path], bytes] | bytes, dims: dict[str, Any] | None = None) -> Callable[[Path], Words]:
    """Shards of one sample `k`; every byte of it is read."""

    def lay(folder: Path) -> Words:
        data = make if isinstance(make, bytes) else make(folder)
        return ["shards", "verify", forge.shards(folder, {"k": data}, dims)]

    return lay


def index(*keys: str | int, to: Any, file: str = INDEX, command: str = "inspect") -> Callable[[Path], Words]:
    """Good shards but for one value."""

    def lay(folder: Path) -> Words:
        out = forge.good(folder)
        forge.edit(out / file, *keys, to=to)
        return ["shards", command, out]

    return lay


def raw(change: Callable[[Path], object], command: str = "inspect") -> Callable[[Path], Words]:
    """Good shards, then a change to the directory."""

    def lay(folder: Path) -> Words:
        out = forge.good(folder)
        change(out)
        return ["shards", command, out]

    return lay


column = partial(index, "columns")
dataset = partial(index, file="dataset.json")
split = partial(index, "splits", "train", file="dataset.json")


def sparse(folder: Path) -> bytes:
    """A GNU sparse member: 512 stored bytes that stand for 8 GiB."""
    block = bytearray(forge.header("k.txt", 512, b"S"))
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"%011o\0" % (8**11 - 1)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


def sound(kind: str, samples: np.ndarray, rate: int = 16000, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def flac_bomb(folder: Path) -> bytes:
    """Two hours of silence in a few kilobytes."""
    return member("k.flac", sound("FLAC", np.zeros(7300 * 16000, np.int16)))


def lying_flac(folder: Path) -> bytes:
    """A second of silence whose header declares 2^36 - 1 samples."""
    data = bytearray(sound("FLAC", np.zeros(16000, np.int16)))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    return member("k.flac", bytes(data))


def link_to_secret(out: Path) -> None:
    secret = out.parent / "secret"
    secret.write_text(CANARY)
    (out / INDEX).unlink()
    (out / INDEX).symlink_to(secret)


def overflowing(out: Path) -> None:
    """Sizes and offsets that fit together in 64 bits."""
    third = 2**65 // 3
    forge.edit(out / INDEX, "columns", "size", to=[third, third, 2**65 - 2 * third])
    forge.edit(out / INDEX, "columns", "offset", to=[0, third, 2 * third % 2**64])


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).unlink()
        make(out / name)

    return change


def sparse_file(path: Path) -> None:
    """A terabyte that takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


WAVE = {"audio": "waveform"}
VISION = {"vision": 5}
NOT_OURS = r"train-000000\.tar, sample k: holds .*, which is not of this sample\. Copy"
NOT_PLAIN = r"train-000000\.tar, sample k: holds k\.txt, which is no plain file \(tar type '{}'\)"
HEADER = r"train-000000\.tar, sample k: has a damaged tar header"
PAX = r"train-000000\.tar, sample k: has an extended tar header with {}"
DAMAGED = r"train-000000\.tar\.index\.json: is damaged \({}.*\)\. Copy the shards again"

# fmt: off
CASES = [
    Case("tar member ../x", sample(member("../x.txt", b"words")), (NOT_OURS,)),
    Case("tar member /etc/x", sample(member("/etc/x.txt", b"words")), (NOT_OURS,)),
    Case("tar member ../x in an extended header", sample(pax({"path": "../x.txt"})), (NOT_OURS,)),
    Case("tar member name that clears the terminal", sample(member(f"{BELL}.txt", b"w")), (r"holds \\x1b\[2J\\x07",)),
    Case("tar member name that forges a line", sample(pax({"path": "x\nerror: all is well"})), (r"holds x\\nerror",)),
    Case("symlink", sample(member("k.txt", kind=b"2", link="/etc/passwd")), (NOT_PLAIN.format(2),)),
    Case("symlink to itself", sample(member("k.txt", kind=b"2", link="k.txt")), (NOT_PLAIN.format(2),)),
    Case("hard link", sample(member("k.txt", kind=b"1", link="/etc/passwd")), (NOT_PLAIN.format(1),)),
    Case("character device", sample(member("k.txt", kind=b"3")), (NOT_PLAIN.format(3),)),
    Case("block device", sample(member("k.txt", kind=b"4")), (NOT_PLAIN.format(4),)),
    Case("directory member", sample(member("k.txt", kind=b"5")), (NOT_PLAIN.format(5),)),
    Case("FIFO member", sample(member("k.txt", kind=b"6")), (NOT_PLAIN.format(6),)),
    Case("sparse member of 8 GiB", sample(sparse), (NOT_PLAIN.format("S"),)),
    Case("sparse member by extended header", sample(pax({"GNU.sparse.realsize": str(2**40)})), (PAX.format("GNU"),)),
    Case("extended header with a negative size", sample(pax({"size": "-1024"})), (PAX.format("size"),)),
    Case("extended header with a huge size", sample(pax({"size": str(2**62)})), (PAX.format("size"),)),
    Case("extended header whose record lies about its length", sample(member("x", b"999999 path=k.txt\n", kind=b"x")),
         (HEADER,)),
    Case("extended header with a length of 1e5 digits", sample(member("x", b"9" * 100_000, kind=b"x")), (HEADER,)),
    Case("size field that is no octal number", sample(member("k.txt", b"words", size=b"12x45678901")), (HEADER,)),
    Case("negative size that leads back to the start", sample(member("k.txt", size=b"-0000002000")), (HEADER,)),
    Case("negative size in base 256", sample(member("k.txt", size=NEGATIVE)), (HEADER,)),
    Case("huge size in base 256", sample(member("k.txt", size=HUGE)), (HEADER,)),
    Case("size beyond the sample", sample(member("k.txt", b"words", size=8**11 - 1)), (HEADER,)),
    Case("member twice", sample(2 * member("k.txt", b"words")), ("sample k: holds k.txt twice",)),
    Case("transcript that is no UTF-8", sample(member("k.txt", b"\xff\xfe")), ("sample k: .*utf-8",)),
    Case("npy with pickled objects", sample(lambda folder: member("k.vision.npy", forge.object_npy(folder / "ran")),
         VISION), (r"sample k: vision\.npy .*objects, which are never loaded",)),
    Case("pickle named npy", sample(member("k.vision.npy", b"\x80\x04]\x94."), VISION),
         ("vision.npy is no .npy file",)),
    Case("npy that declares 2^40 elements", sample(member("k.vision.npy", npy(shape=f"({2**39}, 2)")), VISION),
         ("vision.npy .*declares .* bytes",)),
    Case("npy whose shape overflows", sample(member("k.vision.npy", npy(shape=f"({2**62}, {2**62}, 16)")), VISION),
         ("vision.npy .*declares .* bytes",)),
    Case("npy with a negative shape", sample(member("k.vision.npy", npy(shape="(-3, -5)")), VISION),
         ("vision.npy .*header",)),

    Case("npy header with an expression", sample(member("k.vision.npy", npy(text="__import__('os').mkdir('ran')")),
         VISION), ("vision.npy .*header",)),
    Case("npy header nested deeply", sample(member("k.vision.npy", npy(text="(" * 9000)), VISION),
         ("vision.npy .*header",)),
    Case("npy header of a thousand signs", sample(member("k.vision.npy", npy(text="-" * 9000 + "1")), VISION),
         ("vision.npy .*header",)),
    Case("npy with NaN", sample(member("k.vision.npy", npy(content=np.full(15, np.nan, "<f4").tobytes())), VISION),
         ("sample k: vision holds NaN",)),
    Case("flac that decodes to two hours", sample(flac_bomb, WAVE), ("sample k: flac .*7300 s.*at most 3600",)),
    Case("flac that declares 49 days", sample(lying_flac, WAVE), ("sample k: flac .*at most 3600",)),
    Case("wav of 1e9 Hz", sample(member("k.wav", sound("WAV", np.zeros(16000, np.int16), 10**9)), WAVE),
         ("sample k: wav is not 16000 Hz",)),
    Case("index offset negative", column("offset", 1, to=-1), (DAMAGED.format("columns.offset.1"),)),
    Case("index offset 2^63", column("offset", 1, to=2**63), (DAMAGED.format("columns do not fit"),)),
    Case("index offsets that overlap", column("offset", to=[0, 512, 1024]), (DAMAGED.format("columns do not fit"),)),
    Case("index sizes whose sum overflows to 0", raw(overflowing), (DAMAGED.format("columns do not fit"),)),
    Case("index size of 1e5 digits", raw(lambda out: (out / INDEX).write_text(
         (out / INDEX).read_text().replace('"offset": [0', '"offset": [' + "9" * 100_000))), (DAMAGED.format(""),)),
    Case("index label NaN", column("label", 0, to=float("nan")), (DAMAGED.format("columns.label.0"),)),
    Case("index label Infinity", column("label", 0, to=float("inf")), (DAMAGED.format("columns.label.0"),)),
    Case("index label 1e308", column("label", 0, to=1e308), (DAMAGED.format("columns.label.0"),)),
    Case("index length NaN", column("audio_seconds", 0, to=float("nan")), (DAMAGED.format("columns.audio_seconds.0"),)),
    Case("index length 1e300", column("audio_seconds", 0, to=1e300), (DAMAGED.format("columns.audio_seconds.0"),)),
    Case("index frames 10^30", column("vision_frames", 0, to=10**30), (DAMAGED.format("columns.vision_frames.0"),)),
    Case("index frames that the sample has not", column("vision_frames", 0, to=7, command="verify"),
         ("sample a: has vision_frames None, its index says 7",)),
    Case("index key twice", column("key", 1, to="a"), ("split train holds a key twice",)),
    Case("index key with a folder", column("key", 1, to="../b"), (DAMAGED.format("columns.key.1"),)),
    Case("index key with NUL", column("key", 1, to="b\0"), (DAMAGED.format("columns.key.1"),)),
    Case("index key that clears the terminal", column("key", 1, to=BELL), (DAMAGED.format("columns.key.1"),)),
    Case("index key of a megabyte", column("key", 1, to="k" * 2**20), (DAMAGED.format("columns.key.1"),)),
    Case("index that is a list", raw(lambda out: (out / INDEX).write_text("[1]")), ("has format None",)),
    Case("index nested a million deep", raw(lambda out: (out / INDEX).write_text("[" * 10**6)), (DAMAGED.format(""),)),
    Case("index of a terabyte", raw(lambda out: os.truncate(out / INDEX, 1 << 40)),
         (r"index\.json: has 1099511627776 bytes",)),
    Case("index that is a FIFO", raw(replaced(INDEX, os.mkfifo)), (r"index\.json: is missing",)),
    Case("index that links to a secret", raw(link_to_secret), (DAMAGED.format(""),)),
    Case("tar that is a device", raw(replaced(TAR, lambda path: path.symlink_to("/dev/zero"))),
         (r"\.tar: is missing",)),
    Case("tar named ../x", split("shards", 0, "file", to="../train-000000.tar"),
         (r"dataset\.json: is damaged \(splits",)),
    Case("tar by absolute path", split("shards", 0, "file", to="/etc/train-000000.tar"),
         (r"dataset\.json: is damaged",)),
    Case("tar whose name forges a line", split("shards", 0, "file", to="x\nerror: y"), (r"dataset\.json: is damaged",)),
    Case("content hash that lies", dataset("content_hash", to="0" * 64, command="verify"), ("content_hash differs",)),
    Case("number of samples that lies", split("samples", to=10**18), ("splits.train.samples.*1000000000000000000.*3",)),
    Case("number of samples negative", split("samples", to=-3), (r"dataset\.json: is damaged \(splits.train.samples",)),
    Case("histogram with negative counts", split("labels", "counts", to=[-100, 1]),
         (r"damaged \(splits.train.labels.counts",)),
    Case("seconds that are Infinity", split("seconds", to=float("inf")), (r"damaged \(splits.train.seconds",)),
    Case("label range of Infinity", dataset("label_range", to=[-1e400, 1e400]), (r"damaged \(label_range",)),
    Case("width of 2^60", dataset("dims", "vision", to=2**60), (r"damaged \(dims.vision",)),
    Case("split of another name", dataset("splits", to={"../x": {}}), (r"damaged \(splits",)),
    Case("dataset.json of a million keys", raw(lambda out: (out / "dataset.json").write_text(
         json.dumps({"format": "dist-train-shards/1", **dict.fromkeys(map(str, range(10**6)), 0)}))),
         (r"dataset\.json: is damaged",)),
    Case("dataset.json of a terabyte", raw(replaced("dataset.json", sparse_file)),
         (r"dataset\.json: has 1099511627776 bytes",)),
]
# fmt: on
