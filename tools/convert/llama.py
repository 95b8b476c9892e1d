"""Llamas that are not Hugging Face's: llama2.c's `.bin` (version 0, fp32) and Meta's `consolidated.*.pt`.

Both rotate neighbouring pairs of a head's numbers; transformers rotates number i with number i + d/2. So the rows of
the query and key projections change places.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from dist_train.llm import load_tokenizer
from dist_train.pretrained import layer_problems
from sharding.errors import UserError
from sharding.files import MOST_JSON, read_bounded
from tools.convert.base import stock_shapes
from tools.convert.held import Held, Tensors
from tools.convert.llama_tokenizer import read_tokenizer
from tools.convert.pickles import load_pickle, tensors_of
from tools.convert.source import PREFIX, Context, Source, in_memory, select

HEADER = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
NEWER = 0x616B3432  # "ak42": versions 1 and 2 begin with it
# Parts of a layer by Meta's names → transformers'.
LAYER = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
WHOLE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
SIDEWAYS = ("attention.wo", "feed_forward.w2")  # Meta's shards of these stand side by side, of others below each other


def half_rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads · d] from neighbouring pairs to halves: row 2i of a head → row i, row 2i + 1 → row i + d/2."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def detect_llama2c(path: Path) -> bool:
    """Whether a file is one of llama2.c: its length is what its header says, or it has the mark of a newer version."""
    if not path.is_file() or path.suffix != ".bin":
        return False
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size:
        return False
    head = HEADER.unpack(start)
    return head[0] == NEWER or plausible(head)


def plausible(head: tuple[int, ...]) -> bool:
    """Whether seven numbers are the sizes of a Llama."""
    dim, hidden, layers, heads, kv_heads, vocabulary, length = head
    positive = min(dim, hidden, layers, heads, kv_heads, length) > 0 and vocabulary != 0
    return positive and dim % heads == 0 and heads % kv_heads == 0 and layers < 1000


def read_llama2c(path: Path, context: Context) -> Source:
    """A llama2.c file with the tokenizer beside it (tokenizer.bin, tok*.bin, or a SentencePiece tokenizer.model).

    Raises:
        UserError: it is truncated or of another version, or there is no tokenizer.
    """
    with path.open("rb") as file:
        head = HEADER.unpack(file.read(HEADER.size))
    if head[0] == NEWER:
        raise UserError(
            str(path), "is a llama2.c file of version 1 or 2", "Export it with `export.py --version 0` of llama2.c."
        )
    dim, hidden, layers, heads, kv_heads, vocabulary, length = head
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    size = dim // heads
    narrow = kv_heads * size
    stacks: list[tuple[str, list[int]]] = [
        ("tok_embeddings", [vocabulary, dim]),
        ("attention_norm", [layers, dim]),
        ("attention.wq", [layers, dim, dim]),
        ("attention.wk", [layers, narrow, dim]),
        ("attention.wv", [layers, narrow, dim]),
        ("attention.wo", [layers, dim, dim]),
        ("ffn_norm", [layers, dim]),
        ("feed_forward.w1", [layers, hidden, dim]),
        ("feed_forward.w2", [layers, dim, hidden]),
        ("feed_forward.w3", [layers, hidden, dim]),
        ("norm", [dim]),
        ("freq_cis_real", [length, size // 2]),
        ("freq_cis_imag", [length, size // 2]),
    ]
    stacks += [] if tied else [("output", [vocabulary, dim])]
    expected = HEADER.size + 4 * sum(int(np.prod(shape)) for _, shape in stacks)
    if path.stat().st_size != expected:
        raise UserError(
            str(path), f"has {path.stat().st_size} bytes, its header asks for {expected}", "Give the whole file."
        )
    numbers = torch.from_numpy(np.memmap(path, "<f4", mode="c", offset=HEADER.size))
    found: dict[str, Tensor] = {}
    start = 0
    for name, shape in stacks:
        end = start + int(np.prod(shape))
        block = numbers[start:end].view(shape)
        if name in LAYER:
            found |= {f"layers.{i}.{name}.weight": block[i] for i in range(layers)}
        else:
            found[f"{name}.weight"] = block
        start = end
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=length, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    files = tokenizer_files(path.parent, path.stem)
    if not files:
        raise UserError(str(path), "has no tokenizer.bin, tok*.bin or tokenizer.model beside it", "Put it there.")
    tokenizer = load_tokenizer(str(files[0])) if files[0].suffix == ".model" else read_tokenizer(files[0], vocabulary)
    return Source(
        Held(renamed(in_memory(found), config)), [path, files[0]], models={"llm": config}, tokenizer=tokenizer,
        left_out=["the table of rotary angles: they follow from theta 10000"],
    )  # fmt: skip


def tokenizer_files(folder: Path, stem: str) -> list[Path]:
    """Tokenizers beside a model, the likeliest first."""
    named = [folder / "tokenizer.bin", *sorted(folder.glob("tok*.bin")), folder / "tokenizer.model"]
    return [path for path in dict.fromkeys(named) if path.is_file() and path.stem != stem]


def renamed(found: Tensors, config: LlamaConfig) -> Tensors:
    """Meta's names and order of rows → ours."""
    narrow = config.num_key_value_heads or config.num_attention_heads
    heads = {"attention.wq": config.num_attention_heads, "attention.wk": narrow}
    names: dict[str, str] = {}
    rotated: dict[str, int] = {}
    for name in found.shapes:
        *layer, last = name.removesuffix(".weight").split(".", 2)
        if layer[:1] == ["layers"] and last in LAYER:
            ours = f"{PREFIX['llm']}model.layers.{layer[1]}.{LAYER[last]}.weight"
        elif not layer and last in WHOLE:
            ours = f"{PREFIX['llm']}{WHOLE[last]}.weight"
        else:
            continue  # rotary angles
        names[ours] = name
        if last in heads:
            rotated[ours] = heads[last]
    plain = select(found, names)

    def read(name: str) -> Tensor:
        value = plain.read(name)
        return half_rotary(value, rotated[name]) if name in rotated else value

    return Tensors(plain.shapes, plain.dtypes, read)


def detect_meta(path: Path) -> bool:
    """Whether a folder is Meta's (params.json and consolidated.*.pt)."""
    return (path / "params.json").is_file() and any(path.glob("consolidated.*.pt"))


def read_meta(path: Path, context: Context) -> Source:
    """Meta's folder: params.json, consolidated.00.pt and so on, tokenizer.model.

    Raises:
        UserError: something is missing, damaged, or not supported.
    """
    params = read_params(path / "params.json")
    files = sorted(path.glob("consolidated.*.pt"))
    shards = [tensors_of(load_pickle(file), file) for file in files]
    if any(shard.keys() != shards[0].keys() for shard in shards):
        raise UserError(str(path), "has consolidated.*.pt files that do not belong together", "Give the whole folder.")
    dim = int(params["dim"])
    found = joined(shards, dim)
    heads = int(params["n_heads"])
    embeddings = found.shapes.get("tok_embeddings.weight", [0, 0])
    if embeddings[1] != dim:
        raise UserError(
            str(path), f"has embeddings of width {embeddings[1]}, params.json says {dim}", "Give all consolidated.*.pt."
        )
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=found.shapes.get("layers.0.feed_forward.w1.weight", [1])[0],
        num_hidden_layers=int(params["n_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(params.get("n_kv_heads") or heads),
        vocab_size=embeddings[0],
        rms_norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_parameters={"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10000.0))},
        max_position_embeddings=int(params.get("max_seq_len") or 4096),
        tie_word_embeddings="output.weight" not in found.shapes,
        architectures=["LlamaForCausalLM"],
    )
    held = renamed(found, config)
    wanted = stock_shapes(config, "llm")
    for name, shape in wanted.items():
        has = held.shapes.get(PREFIX["llm"] + name)
        if has != shape:
            raise UserError(
                str(path), f"has {name} of shape {has}, params.json asks for {shape}", "Give all its files."
            )
    tokenizer = load_tokenizer(str(path / "tokenizer.model")) if (path / "tokenizer.model").is_file() else None
    if tokenizer is not None:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Source(Held(held), [path / "params.json", *files], models={"llm": config}, tokenizer=tokenizer)


def read_params(path: Path) -> dict[str, Any]:
    """params.json.

    Raises:
        UserError: it lacks something, or asks for what is not supported.
    """
    try:
        params = json.loads(read_bounded(path, MOST_JSON, "Give Meta's params.json."))
        sizes = [int(params[key]) for key in ("dim", "n_layers", "n_heads")]
        if min(sizes) < 1:
            raise ValueError("a size below 1")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(str(path), f"cannot be read ({error!r})", "Give Meta's params.json.") from None
    too_deep = next(layer_problems(params, str(path)), None)
    if too_deep is not None:
        raise too_deep
    if params.get("use_scaled_rope"):
        raise UserError(
            str(path), "asks for scaled rotary angles (Llama 3.1 and later)", "Give Meta's Hugging Face folder."
        )
    return params


def joined(shards: list[dict[str, Tensor]], dim: int) -> Tensors:
    """Tensors whose pieces lie in several files (Megatron's model parallelism), put together when read."""
    first = shards[0]
    axis: dict[str, int | None] = {}
    for name, value in first.items():
        if value.dim() < 2 or len(shards) == 1:
            axis[name] = None
        elif name.startswith("tok_embeddings."):  # Llama 1 and 2 cut the width, Llama 3 the vocabulary
            axis[name] = 0 if value.shape[1] == dim else 1
        else:
            axis[name] = 1 if any(part in name for part in SIDEWAYS) else 0
    shapes = {name: list(value.shape) for name, value in first.items()}
    for name, along in axis.items():
        if along is not None:
            shapes[name][along] *= len(shards)

    def read(name: str) -> Tensor:
        along = axis[name]
        return first[name] if along is None else torch.cat([shard[name] for shard in shards], along)

    return Tensors(shapes, {name: value.dtype for name, value in first.items()}, read)
