"""Safetensors files in shards with an index, as Hugging Face folders hold them, written tensor by tensor.

safetensors' own `save_file` wants a whole file in memory. Its format lets one write it in one pass instead: the length
of the header (8 bytes, little endian), the header (JSON: of each tensor its dtype, shape and place), the tensors'
bytes one after another (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from sharding.portable import flush
from tools.convert.held import Tensors

PIECE = 30 << 10  # elements; torch's threads take part from 32 Ki on
BUFFER = 8 << 20  # bytes of one write
SHARD_BYTES = 5_000_000_000  # as save_pretrained of transformers 4 has it
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def unseen(name: str, size: int) -> None:
    """Default of the callbacks `on_tensor(name, bytes)`."""


def write_shards(
    folder: Path,
    tensors: Tensors,
    *,
    stem: str = "model",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[str, int], None] = unseen,
) -> list[Path]:
    """Writes <stem>.safetensors, or <stem>-00001-of-0000N.safetensors and <stem>.safetensors.index.json, and forces
    them to disk. Memory: one tensor.

    Args:
        folder: is there.
        dtype: of all floating-point tensors in the files; None leaves each its own.
        shard_bytes: a file has no more, unless a tensor alone does.
        on_tensor: called after each tensor.

    Returns:
        The files, the index last.

    Raises:
        OSError: the disk refuses it.
        ValueError: a tensor is not what `tensors` said of it.
    """
    kinds = {name: stored(held, dtype) for name, held in tensors.dtypes.items()}
    sizes = {name: math.prod(shape) * kinds[name].itemsize for name, shape in tensors.shapes.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    written = []
    for file, names in plan.filename_to_tensors.items():
        with (folder / file).open("wb") as out:
            write_file(out, names, tensors, kinds, on_tensor)
        flush(folder / file)
        written.append(folder / file)
    if plan.is_sharded:
        index = folder / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}, indent=2))
        flush(index)
        written.append(index)
    return written


def stored(held: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is written in."""
    return wanted if wanted is not None and held.is_floating_point else held


def write_file(
    out: IO[bytes],
    names: list[str],
    tensors: Tensors,
    kinds: Mapping[str, torch.dtype],
    on_tensor: Callable[[str, int], None],
) -> None:
    """One file; wider numbers first, so that all of them lie aligned."""
    names = sorted(names, key=lambda name: -kinds[name].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name in names:
        start, end = end, end + math.prod(tensors.shapes[name]) * kinds[name].itemsize
        entries[name] = {"dtype": NAMES[kinds[name]], "shape": tensors.shapes[name], "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    out.write(len(header).to_bytes(8, "little") + header)
    with ThreadPoolExecutor(1) as writer:  # so that the next tensor is read while the disk is busy
        writing = None
        for full in filled(names, tensors, kinds, on_tensor):
            if writing is not None:
                writing.result()
            writing = writer.submit(out.write, full.numpy().data)
        if writing is not None:
            writing.result()


def filled(
    names: list[str],
    tensors: Tensors,
    kinds: Mapping[str, torch.dtype],
    on_tensor: Callable[[str, int], None],
) -> Iterator[Tensor]:
    """The tensors' bytes, cast, in two buffers by turns: what is given stays until the next but one is asked for.

    They are copied in pieces that stay in the processor's cache; torch would share larger ones among threads, which
    wait for each other where cores are busy.
    """
    buffer, other = torch.empty(BUFFER, dtype=torch.uint8), torch.empty(BUFFER, dtype=torch.uint8)
    end = 0
    for name in names:
        tensor, kind = tensors.read(name), kinds[name]
        if list(tensor.shape) != tensors.shapes[name] or tensor.dtype != tensors.dtypes[name]:
            raise ValueError(f"{name} was said to be {tensors.dtypes[name]} {tensors.shapes[name]}")
        for piece in tensor.detach().contiguous().view(-1).split(PIECE):
            start, end = end, end + len(piece) * kind.itemsize
            if end > BUFFER:
                yield buffer[:start]
                buffer, other = other, buffer
                start, end = 0, end - start
            buffer[start:end].view(kind).copy_(piece)
        on_tensor(name, tensor.numel() * kind.itemsize)
    yield buffer[:end]
