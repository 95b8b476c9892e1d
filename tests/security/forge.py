"""Shard directories whose checksums are right and whose content is hostile: what somebody could publish."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from sharding.shards import FORMAT, content_hash

TAR = "train-000000.tar"
INDEX = f"{TAR}.index.json"
BLOCK = 512


def header(name: str, size: int | bytes, kind: bytes = b"0", link: str = "") -> bytes:
    """A tar header with a right checksum, whatever its fields say. `size`: a number, or the field's 12 bytes."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(BLOCK)
    block[0:100] = name.encode().ljust(100, b"\0")[:100]
    block[100:124] = b"0000444\0" + b"0000000\0" * 2
    block[124:136] = field.ljust(12, b"\0")
    block[136:157] = b"00000000000\0" + b" " * 8 + kind
    block[157:257] = link.encode().ljust(100, b"\0")
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, content: bytes = b"", **fields: Any) -> bytes:
    """A header and its content, padded; `size` of the fields may lie."""
    fields = {"size": len(content), **fields}
    return header(name, **fields) + content + bytes(-len(content) % BLOCK)


def pax(records: dict[str, str], name: str = "k.txt", content: bytes = b"words") -> bytes:
    """A member behind an extended header with these records."""
    info = tarfile.TarInfo(name)
    body = info._create_pax_generic_header(records, tarfile.XHDTYPE, "utf-8")  # type: ignore[attr-defined]
    return body + member(name, content)


def npy(descr: str = "'<f4'", shape: str = "(3, 5)", content: bytes = bytes(60), text: str | None = None) -> bytes:
    """A .npy file whose header says what is given."""
    body = (text or f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}").encode()
    body += b" " * (-(len(body) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + content


def object_npy(canary: Path) -> bytes:
    """A .npy file whose pickled objects would make the file `canary`."""

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (canary,)

    buffer = io.BytesIO()
    np.save(buffer, np.array([[Harmful()]], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def shards(folder: Path, samples: dict[str, bytes], dims: dict[str, Any] | None = None) -> Path:
    """A directory of one tar of these samples (members and all), its index and its dataset.json, all consistent."""
    out = folder / "shards"
    out.mkdir()
    data = b"".join(samples.values()) + bytes(2 * BLOCK)
    (out / TAR).write_bytes(data)
    sizes = [len(sample) for sample in samples.values()]
    count = len(samples)
    digests = [hashlib.sha256(sample).hexdigest() for sample in samples.values()]
    columns: dict[str, list[Any]] = {
        "key": list(samples),
        "offset": [sum(sizes[:i]) for i in range(count)],
        "size": sizes,
        "sha256": digests,
        "label": [0.0] * count,
        **{name: [None] * count for name in ("audio_seconds", "audio_frames", "text_frames", "vision_frames")},
        "text_characters": [5] * count,
    }
    tar: dict[str, Any] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write(out / INDEX, {"format": FORMAT, "split": "train", "tar": TAR, **tar, "columns": columns})
    labels: dict[str, Any] = {"min": 0, "max": 0, "mean": 0, "median": 0, "edges": [-3, 0, 3], "counts": [0, count]}
    missing = dict.fromkeys(("audio", "text", "vision"), 0)
    split: dict[str, Any] = {"shards": [{"file": TAR, "samples": count, **tar}], "samples": count, "seconds": 0}
    triples = (("train", *pair) for pair in zip(samples, digests, strict=True))
    info: dict[str, Any] = {
        "format": FORMAT,
        "splits": {"train": {**split, "labels": labels, "missing": missing}},
        "dims": dims or {},
    }
    info |= {"sample_rate": 16000, "label_range": [-3, 3], "set_aside": [], "content_hash": content_hash(triples)}
    write(out / "dataset.json", info)
    return out


def good(folder: Path) -> Path:
    """Shards of three samples with a text each, and nothing wrong."""
    return shards(folder, {key: member(f"{key}.txt", b"words") for key in ("a", "b", "c")})


def edit(path: Path, *keys: str | int, to: Any) -> None:
    """Changes one value inside a JSON file."""
    record = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    write(path, record)


def write(path: Path, record: Any) -> None:
    """A record as a JSON file."""
    path.write_text(json.dumps(record))
