"""Hostile checkpoints, projectors and model folders. Their readers are called as the commands call them."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_train.llm import load_tokenizer
from dist_train.pretrained import load_model
from dist_train.projector import Projector, load_projector
from dist_train.rollout import SimulationSettings
from sharding import portable
from tests.security.attempt import Reader
from tests.security.case import Case

MODEL, OPTIMIZER = "model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"


def read_checkpoint(folder: Path) -> None:
    """Everything of a checkpoint."""
    held = portable.Portable(folder / "step_00000001")
    for kind in ("model", "optimizer"):
        for name, _ in held.tensors(kind):
            held.shape(kind, name)
            held.dtype(kind, name)


def read_projector(folder: Path) -> None:
    load_projector(Projector(3, 4, SimulationSettings(projector_width=7)), str(folder / "projector"))


def read_language_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    load_model(AutoModelForCausalLM, "text.pretrained", str(folder / "model"), dtype=torch.float32)


def read_tokenizer(folder: Path) -> None:
    load_tokenizer(str(folder / "model"))


def checkpoint(change: Callable[[Path], object], *, sealed: bool = True) -> Callable[[Path], Reader]:
    """A good checkpoint, a change to it, and (sealed) a manifest that fits it again."""

    def lay(folder: Path) -> Reader:
        place = folder / "step_00000001"
        tensors = [("a", torch.ones(3))]
        portable.write(place, tensors, [("exp_avg.a", torch.ones(3))], {"adam_step": 1})
        change(place)
        if sealed:
            names = (MODEL, OPTIMIZER, portable.STATE)
            files = {name: portable.seal(place / name).model_dump() for name in names}
            (place / portable.MANIFEST).write_text(json.dumps({"format": portable.FORMAT, "files": files}))
        return read_checkpoint

    return lay


def weights(header: Any, data: bytes = b"\0" * 12, length: int | None = None) -> Callable[[Path], Reader]:
    """A checkpoint whose weights have this header of safetensors, and a manifest that fits."""
    return checkpoint(lambda place: (place / MODEL).write_bytes(safetensors(header, data, length)))


def safetensors(header: Any, data: bytes = b"\0" * 12, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str = "F32", shape: Any = (3,), offsets: Any = (0, 12)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Reader]:
    """A good checkpoint with a change to manifest.json."""

    def edit(place: Path) -> None:
        record = json.loads((place / portable.MANIFEST).read_text())
        change(record)
        (place / portable.MANIFEST).write_text(json.dumps(record))

    return checkpoint(edit, sealed=False)


def lists(name: str) -> Callable[[Path], Reader]:
    """manifest.json names one more file."""
    return manifest(lambda record: record["files"].update({name: record["files"][MODEL]}))


def endless(place: Path) -> None:
    """Weights that are a device of 0 bytes, as the manifest says."""
    (place / MODEL).unlink()
    (place / MODEL).symlink_to("/dev/zero")
    record = json.loads((place / portable.MANIFEST).read_text())
    record["files"][MODEL]["bytes"] = 0
    (place / portable.MANIFEST).write_text(json.dumps(record))


def fifo(name: str, place: Path) -> None:
    (place / name).unlink()
    os.mkfifo(place / name)
    if name != portable.MANIFEST:
        record = json.loads((place / portable.MANIFEST).read_text())
        record["files"][name]["bytes"] = 0
        (place / portable.MANIFEST).write_text(json.dumps(record))


def terabyte(place: Path) -> None:
    os.truncate(place / portable.MANIFEST, 1 << 40)


def second(place: Path) -> None:
    """Another file of weights with the same tensor."""
    name = "model-00002-of-00001.safetensors"
    (place / name).write_bytes((place / MODEL).read_bytes())
    record = json.loads((place / portable.MANIFEST).read_text())
    record["files"][name] = record["files"][MODEL]
    (place / portable.MANIFEST).write_text(json.dumps(record))


def write_text(name: str, text: str) -> Callable[[Path], Reader]:
    return checkpoint(lambda place: (place / name).write_text(text), sealed=name != portable.MANIFEST)


class Harmful:
    """Unpickled, makes a directory."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def projector(make: Callable[[Path], object], name: str = "model.pt") -> Callable[[Path], Reader]:
    """A projector file, in the directory that the recipe names."""

    def lay(folder: Path) -> Reader:
        (folder / "projector").mkdir()
        make(folder / "projector" / name)
        return read_projector

    return lay


def zip_bomb(path: Path) -> None:
    """A pickle of 1.2 GB of zeros in 5 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("archive/version", "3\n")
        with file.open("archive/data.pkl", "w") as pickle:
            for _ in range(72):
                pickle.write(bytes(1 << 24))


def saved(first: torch.Tensor) -> Callable[[Path], object]:
    """Writes a projector that fits, but for its first tensor."""
    state = Projector(3, 4, SimulationSettings(projector_width=7)).state_dict()
    weights = {f"encoder_projector.{name}": value for name, value in state.items()}
    return partial(torch.save, {**weights, "encoder_projector.linear1.weight": first})


def bare_pickle(path: Path) -> None:
    torch.save(Harmful(), path, _use_new_zipfile_serialization=False)


def lying(path: Path) -> None:
    path.write_bytes(safetensors({"a": tensor()}, length=2**60))


pickled = partial(torch.save, {"projector.linear1.weight": Harmful()})
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
         "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}  # fmt: skip


def model(files: dict[str, Any], reader: Reader = read_language_model, **config: Any) -> Callable[[Path], Reader]:
    """A model folder: config.json and these files (bytes, JSON, or a function that writes them)."""

    def lay(folder: Path) -> Reader:
        place = folder / "model"
        place.mkdir()
        (place / "config.json").write_text(json.dumps({**LLAMA, **config}))
        for name, content in files.items():
            if callable(content):
                content(place / name)
            else:
                (place / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return reader

    return lay


REMOTE: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
}
EVIL = {"evil.py": b"import os\nos.mkdir('ran')\n"}
NO_NUMBERS = r"simulation\.projector: .* are no plain numbers"
NO_MANIFEST = r"step_00000001: is not a complete checkpoint \(no valid manifest\.json: .*\)\. Give another"
NO_WEIGHTS = r"model-00001-of-00001\.safetensors: cannot be read \(.*\)\. Use another checkpoint"
DIFFERS = r"{}: is missing or damaged \(it differs from manifest\.json\)\. Use another"
NO_STATE = r"state\.json: (cannot be read|holds no JSON object).*\. Use another"
NO_PROJECTOR = r"simulation\.projector: .* cannot be read \(.*\)\. Give the run"
NO_MODEL = r"text\.pretrained: cannot load .*\. Give a local folder"

# fmt: off
CASES = [
    Case("manifest names ../../x", lists("../../x"), (NO_MANIFEST,)),
    Case("manifest names an absolute path", lists("/etc/passwd"), (NO_MANIFEST,)),
    Case("manifest names weights in a folder", lists("../model-00001-of-00001.safetensors"), (NO_MANIFEST,)),
    Case("manifest that is nested deeply", write_text(portable.MANIFEST, "[" * 10**6), (NO_MANIFEST,)),
    Case("manifest with a negative size", manifest(lambda record: record["files"][MODEL].update(bytes=-1)),
         (NO_MANIFEST,)),
    Case("manifest with a size of 1e5 digits", write_text(portable.MANIFEST, '{"format": ' + "9" * 10**5),
         (NO_MANIFEST,)),
    Case("manifest without files", manifest(lambda record: record.update(files={})), (NO_MANIFEST,)),
    Case("manifest that is a FIFO", checkpoint(partial(fifo, portable.MANIFEST), sealed=False),
         ("manifest.json: is not a reg",)),
    Case("manifest of a terabyte", checkpoint(terabyte, sealed=False),
         (r"manifest\.json: has 1099511627776 bytes",)),
    Case("weights that are a device", checkpoint(endless, sealed=False), (DIFFERS.format(MODEL),)),
    Case("weights that are a FIFO", checkpoint(partial(fifo, MODEL), sealed=False), (DIFFERS.format(MODEL),)),
    Case("state that is a FIFO", checkpoint(partial(fifo, "state.json"), sealed=False),
         (DIFFERS.format("state.json"),)),
    Case("state that is a list", write_text("state.json", "[1]"), (NO_STATE,)),
    Case("state nested deeply", write_text("state.json", "[" * 10**6), (NO_STATE,)),
    Case("state with a number of 1e5 digits", write_text("state.json", "9" * 10**5), (NO_STATE,)),
    Case("safetensors header of 2^60 bytes", weights({"a": tensor()}, length=2**60), (NO_WEIGHTS,)),
    Case("safetensors header of 2^64 - 1 bytes", weights({"a": tensor()}, length=2**64 - 1), (NO_WEIGHTS,)),
    Case("safetensors header that is no JSON", weights(b"{'a'" + b" " * 100), (NO_WEIGHTS,)),
    Case("safetensors header nested deeply", weights(b"[" * 10**6), (NO_WEIGHTS,)),
    Case("safetensors offsets beyond the file", weights({"a": tensor(offsets=(0, 2**40))}), (NO_WEIGHTS,)),
    Case("safetensors offsets that overlap", weights({"a": tensor(), "b": tensor()}), (NO_WEIGHTS,)),
    Case("safetensors with a hole", weights({"a": tensor(), "b": tensor(offsets=(24, 36))}, bytes(36)), (NO_WEIGHTS,)),
    Case("safetensors offsets backwards", weights({"a": tensor(offsets=(12, 0))}), (NO_WEIGHTS,)),
    Case("safetensors offsets negative", weights({"a": tensor(offsets=(-12, 0))}), (NO_WEIGHTS,)),
    Case("safetensors dtype that lies", weights({"a": tensor(dtype="F64")}), (NO_WEIGHTS,)),
    Case("safetensors dtype unknown", weights({"a": tensor(dtype="OBJECT")}), (NO_WEIGHTS,)),
    Case("safetensors shape that overflows", weights({"a": tensor(shape=(2**40, 2**40))}), (NO_WEIGHTS,)),
    Case("safetensors shape negative", weights({"a": tensor(shape=(-3,))}), (NO_WEIGHTS,)),
    Case("tensor in two files", checkpoint(second, sealed=False), ("model-00002.*: holds a, which another file",)),
    Case("projector that runs a command", projector(pickled), (NO_PROJECTOR,)),
    Case("projector that is a bare pickle", projector(bare_pickle), (NO_PROJECTOR,)),
    Case("projector that is a zip bomb", projector(zip_bomb), (NO_PROJECTOR,)),
    Case("projector of sparse tensors", projector(saved(torch.zeros(7, 15).to_sparse())), (NO_NUMBERS,)),
    Case("projector of tensors without data", projector(saved(torch.zeros(7, 15, device="meta"))), (NO_NUMBERS,)),
    Case("projector of NaN", projector(saved(torch.full((7, 15), torch.nan))), (r"projector: .* that are not finite",)),
    Case("projector that is a list", projector(partial(torch.save, [1])), (r"projector: .* holds no weights",)),
    Case("projector of lying safetensors", projector(lying, "model.safetensors"), (NO_PROJECTOR,)),
    Case("model weights that run a command", model({"pytorch_model.bin": pickled}), (NO_MODEL,)),
    Case("model weights that are a bare pickle", model({"pytorch_model.bin": bare_pickle}), (NO_MODEL,)),
    Case("model of lying safetensors", model({"model.safetensors": lying}), (NO_MODEL,)),
    Case("model that names weights outside", model({"model.safetensors.index.json": {"metadata": {}, "weight_map": {
         "model.embed_tokens.weight": "../../../../etc/passwd"}}}), (NO_MODEL,)),
    Case("model of a billion layers", model({}, num_hidden_layers=10**9),
         (r"text\.pretrained\.num_hidden_layers: is 1e\+09",)),
    Case("model with code of its own", model(EVIL, model_type="evil", **REMOTE),
         (NO_MODEL,)),
    Case("model configuration nested deeply", model({"config.json": b"[" * 10**6}), (NO_MODEL,)),
    Case("model configuration that is a list", model({"config.json": b"[1]"}), (NO_MODEL,)),
    Case("tokenizer with code of its own", model({**EVIL, "tokenizer_config.json": REMOTE}, read_tokenizer, **REMOTE),
         (r"text\.tokenizer: cannot load",)),
    Case("tokenizer nested deeply", model({"tokenizer.json": b"[" * 10**6}, read_tokenizer),
         (r"text\.tokenizer: cannot load",)),
    Case("tokenizer that is no tokenizer", model({"tokenizer.json": {"model": {"vocab": 7}}}, read_tokenizer),
         (r"text\.tokenizer: cannot load",)),
]
# fmt: on
