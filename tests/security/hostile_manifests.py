"""Hostile manifests, and hostile files that manifests name."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from tests.security import forge
from tests.security.attempt import CANARY, Words
from tests.security.case import Case

HEADER = b"key,audio,text,vision,label,split\n"


def manifest(content: bytes, name: str = "m.csv", option: str = "stop") -> Callable[[Path], Words]:
    """A manifest of these bytes."""

    def lay(folder: Path) -> Words:
        (folder / name).write_bytes(content)
        return ["shards", "make", name, "out", "--workers", "1", "--on-bad-sample", option]

    return lay


def row(
    audio: str = "", text: str = "t", vision: str = "", key: str = "k", label: str = "0"
) -> Callable[[Path], Words]:
    """A CSV manifest of one row."""
    return manifest(HEADER + f"{key},{audio},{text},{vision},{label},train\n".encode())


def names(file: str, make: Callable[[Path], object]) -> Callable[[Path], Words]:
    """A manifest that names one file, and the file."""

    def lay(folder: Path) -> Words:
        make(folder / file)
        vision, audio = (file, "") if file.endswith(".npy") else ("", file)
        return row(audio=audio, vision=vision)(folder)

    return lay


def jsonl(*lines: str) -> Callable[[Path], Words]:
    return manifest("\n".join(lines).encode(), "m.jsonl")


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def wav(rate: int = 16000, channels: int = 1, declared: int | None = None, samples: int = 16000) -> bytes:
    """A PCM16 wav whose header says what is given."""
    data = bytes(2 * samples)
    frame = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame % 2**32, frame % 2**16, 16)
    size = len(data) if declared is None else declared
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + body


def flac(seconds: int, declared: int | None = None) -> bytes:
    """Silence, a few kilobytes of it an hour; `declared`: the number of samples that the header tells."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(seconds * 16000, np.int16), 16000, format="FLAC")
    data = bytearray(buffer.getvalue())
    if declared is not None:
        data[21] = (data[21] & 0xF0) | declared >> 32
        data[22:26] = (declared % 2**32).to_bytes(4, "big")
    return bytes(data)


def sparse_wav(path: Path) -> None:
    """RIFF, then a terabyte of empty chunks that takes no room."""
    path.write_bytes(b"RIFF\0\0\0\0WAVE")
    os.truncate(path, 1 << 40)


def terabyte(name: str, head: bytes) -> Callable[[Path], Words]:
    def lay(folder: Path) -> Words:
        words = manifest(head, name)(folder)
        os.truncate(folder / name, 1 << 40)
        return words

    return lay


def fifo_manifest(folder: Path) -> Words:
    os.mkfifo(folder / "m.csv")
    return ["shards", "make", "m.csv", "out"]


def secret(folder: Path) -> Words:
    """A sound that links to a file of somebody else."""
    (folder / "secret").write_text(CANARY * 100)
    (folder / "a.wav").symlink_to("secret")
    (folder / "v.npy").symlink_to("secret")
    return row(audio="a.wav", vision="v.npy")(folder)


def out_is_a_link(folder: Path) -> Words:
    (folder / "elsewhere").mkdir()
    (folder / "out").symlink_to("elsewhere")
    return row()(folder)


def good_json(**changes: object) -> str:
    return json.dumps({"key": "k", "text": "t", "label": 0, "split": "train", **changes})


NO_FILE = r"m\.csv:2 \(k\): {} file {} is not a regular file\. Correct the path"
NO_NPY = r"sample k, v\.npy: {}.*\. Repair the file, leave the cell empty"
NO_WAV = r"sample k, .*: {}.*\. Repair the file, leave the cell empty"

# fmt: off
CASES = [
    Case("audio /dev/zero", row(audio="/dev/zero"), (r"audio file /dev/zero is not of a known kind",)),
    Case("audio /dev/stdin", row(audio="/dev/stdin"), (r"audio file /dev/stdin is not of a known kind",)),
    Case("audio that links to /dev/zero", names("a.wav", link("/dev/zero")), (NO_FILE.format("audio", "a.wav"),)),
    Case("audio that is a FIFO", names("a.wav", os.mkfifo), (NO_FILE.format("audio", "a.wav"),)),
    Case("features that are a FIFO", names("v.npy", os.mkfifo), (NO_FILE.format("vision", "v.npy"),)),
    Case("audio that is a directory", names("a.wav", Path.mkdir), (NO_FILE.format("audio", "a.wav"),)),
    Case("audio that links to itself", names("a.wav", link("a.wav")), (r"audio file a\.wav is missing",)),
    Case("audio that is somebody's secret", secret, (r"sample k, a\.wav: cannot be decoded",)),
    Case("audio name with NUL", row(audio="a\0.wav"), (r"audio file a\\x00\.wav is missing",)),
    Case("audio name of a megabyte", row(audio="a" * 2**20 + ".wav"), (r"audio file name cannot be used",)),
    Case("wav that declares 1.9 GB", names("a.wav", content(wav(declared=0x70000000))),
         (NO_WAV.format("is truncated"),)),
    Case("wav of 0 channels", names("a.wav", content(wav(channels=0))), (NO_WAV.format("cannot be decoded"),)),
    Case("wav of 60000 channels", names("a.wav", content(wav(channels=60000))), (NO_WAV.format("cannot be decoded"),)),
    Case("wav of 1e9 Hz", names("a.wav", content(wav(rate=10**9))), (NO_WAV.format("has 1000000000 Hz"),)),
    Case("wav of 1 Hz", names("a.wav", content(wav(rate=1))), (NO_WAV.format("has 1 Hz"),)),
    Case("wav of a terabyte", names("a.wav", sparse_wav), (NO_WAV.format("has no audio"),)),
    Case("flac that decodes to two hours", names("a.flac", content(flac(7300))), (NO_WAV.format("lasts 7300 s"),)),
    Case("flac that declares 49 days", names("a.flac", content(flac(1, 2**36 - 1))),
         (NO_WAV.format("lasts 4294967 s"),)),
    Case("flac that declares nothing and lasts two hours", names("a.flac", content(flac(7300, 0))),
         (NO_WAV.format("lasts .* does not tell"),)),
    Case("npy of pickled objects", lambda folder: names("v.npy", content(forge.object_npy(folder / "ran")))(folder),
         (NO_NPY.format("holds pickled objects, which are never loaded"),)),
    Case("npy that declares 2^62 numbers", names("v.npy", content(forge.npy(shape=f"({2**60}, 4)"))),
         (NO_NPY.format("is truncated or lies"),)),
    Case("npy that declares objects in a record", names("v.npy", content(forge.npy(descr="[('a', 'O')]"))),
         (NO_NPY.format("holds pickled objects"),)),
    Case("npy of numbers without bytes", names("v.npy", content(forge.npy(descr="'|V0'", shape=f"({2**60}, 4)"))),
         (NO_NPY.format("has type"),)),
    Case("npy header with an expression", names("v.npy", content(forge.npy(text="().__class__.__base__.__doc__"))),
         (NO_NPY.format("has a damaged .npy header"),)),
    Case("npy that is no npy", names("v.npy", content(b"root:x:0:0\n")), (NO_NPY.format("is no .npy file"),)),
    Case("npy that is an archive", names("v.npy", content(b"PK\x03\x04" * 20)), (NO_NPY.format("is an archive"),)),
    Case("CSV with NUL", manifest(HEADER + b"k\0,,t,,0,train\n"), (r"m\.csv:2: key 'k\\x00' holds '\\x00'",)),
    Case("CSV of one endless line", manifest(HEADER + b"k,,t,,0," + b"x" * 20_000_000), ("unknown split 'xxx",)),
    Case("CSV text without end", row(text="words " * 2_000_000), (r"m\.csv:2 \(k\): text of 11999999 characters",)),
    Case("CSV of a million quotes", manifest(HEADER + b'"' * 1_000_001), ("is not valid CSV",)),
    Case("CSV of formulas", row(label='=HYPERLINK("http://x")', key="=1+1"), ("label '=HYPERLINK",)),
    Case("CSV key that clears the terminal", row(key="\x1b[2J"), (r"key '\\x1b\[2J' holds '\\x1b'",)),
    Case("CSV key ../x", row(key="../x"), (r"key '../x' holds '\.', '/'",)),
    Case("CSV key of a megabyte", row(key="k" * 2**20), (r"key of 1048576 characters",)),
    Case("CSV label of 1e5 digits", row(label="9" * 100_000), (r"label .* is outside",)),
    Case("manifest of a terabyte", terabyte("m.csv", HEADER), (r"m\.csv: has 1099511627776 bytes",)),
    Case("manifest that is a FIFO", fifo_manifest, (r"m\.csv: is not a regular file",)),
    Case("manifest that is a device", lambda folder: ["shards", "make", "/dev/zero", "out"],
         ("/dev/zero: is not a regular",)),
    Case("JSONL nested a million deep", jsonl("[" * 10**6), (r"m\.jsonl:1: is not valid JSON",)),
    Case("JSONL label of 1e5 digits", jsonl(good_json().replace("0", "9" * 100_000)),
         (r"m\.jsonl:1: is not valid JSON",)),
    Case("JSONL label NaN", jsonl(good_json(label=float("nan"))), (r"label 'NaN' is not a number",)),
    Case("JSONL label 1e308", jsonl(good_json(label=1e308)), (r"label 1e\+308 is outside",)),
    Case("JSONL with a field twice", jsonl('{"key": "k", "label": 0, "label": 1, "text": "t", "split": "train"}'),
         (r"m\.jsonl:1: .*field 'label' stands twice",)),
    Case("JSONL that names a path of a list", jsonl(good_json(audio=["/etc/passwd"])), ("audio holds a list",)),
    Case("JSONL field name that forges a line", jsonl(good_json(label=7, **{"x\nerror: y": 0})),
         ("label 7 is outside",)),
    Case("label range beyond fp32", lambda folder: [*row()(folder), "--label-range", "-1e300", "1e300"],
         ("label range: ",)),
    Case("output that is a link", out_is_a_link, ("out: exists",)),
]
# fmt: on
