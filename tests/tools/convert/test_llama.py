"""Llamas of llama2.c and of Meta: what transformers makes of the result equals their own forward, written out here."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tools.convert.fixtures import Convert
from tests.tools.convert.runs import MakeRun
from tools.convert.llama_tokenizer import read_pieces, read_tokenizer

DATA = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"
STORIES, PIECES = DATA / "stories260K.bin", DATA / "tok512.bin"
needs_data = pytest.mark.skipif(not STORIES.exists(), reason="no stories260K.bin beside the checkout")

DIM, HIDDEN, LAYERS, HEADS, KV, VOCABULARY, LENGTH = 24, 40, 2, 4, 2, 300, 64


def forward(w: dict[str, Tensor], ids: list[int], heads: int, kv: int, eps: float, theta: float) -> Tensor:
    """Meta's Llama, token by token in float64: neighbouring pairs of a head rotate. → logits [L, V]."""
    w = {name: value.double() for name, value in w.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    size = w["tok_embeddings.weight"].shape[1] // heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean() + eps) * w[f"{name}.weight"]

    def rotate(x: Tensor, place: int) -> Tensor:
        out = x.clone()
        for i in range(0, size, 2):
            angle = torch.tensor(place * theta ** (-i / size), dtype=torch.float64)
            a, b = x[:, i], x[:, i + 1]
            out[:, i] = a * angle.cos() - b * angle.sin()
            out[:, i + 1] = a * angle.sin() + b * angle.cos()
        return out

    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(layers)]
    rows = []
    for place, token in enumerate(ids):
        x = w["tok_embeddings.weight"][token]
        for layer in range(layers):
            at = f"layers.{layer}."
            h = norm(x, f"{at}attention_norm")
            q = rotate((w[f"{at}attention.wq.weight"] @ h).view(heads, size), place)
            k = rotate((w[f"{at}attention.wk.weight"] @ h).view(kv, size), place)
            kept[layer].append((k, (w[f"{at}attention.wv.weight"] @ h).view(kv, size)))
            outs = []
            for head in range(heads):
                shared = head // (heads // kv)
                keys, values = (torch.stack([pair[n][shared] for pair in kept[layer]]) for n in (0, 1))
                outs.append(torch.softmax(keys @ q[head] / size**0.5, 0) @ values)
            x = x + w[f"{at}attention.wo.weight"] @ torch.cat(outs)
            h = norm(x, f"{at}ffn_norm")
            gate = w[f"{at}feed_forward.w1.weight"] @ h
            inner = gate * torch.sigmoid(gate) * (w[f"{at}feed_forward.w3.weight"] @ h)
            x = x + w[f"{at}feed_forward.w2.weight"] @ inner
        rows.append(w.get("output.weight", w["tok_embeddings.weight"]) @ norm(x, "norm"))
    return torch.stack(rows)


def drawn(*, tied: bool) -> dict[str, Tensor]:
    """Random weights under Meta's names."""
    narrow = DIM // HEADS * KV
    shapes = {"tok_embeddings": (VOCABULARY, DIM), "norm": (DIM,)}
    shapes |= {} if tied else {"output": (VOCABULARY, DIM)}
    for i in range(LAYERS):
        shapes |= {
            f"layers.{i}.attention.wq": (DIM, DIM), f"layers.{i}.attention.wk": (narrow, DIM),
            f"layers.{i}.attention.wv": (narrow, DIM), f"layers.{i}.attention.wo": (DIM, DIM),
            f"layers.{i}.feed_forward.w1": (HIDDEN, DIM), f"layers.{i}.feed_forward.w2": (DIM, HIDDEN),
            f"layers.{i}.feed_forward.w3": (HIDDEN, DIM),
            f"layers.{i}.attention_norm": (DIM,), f"layers.{i}.ffn_norm": (DIM,),
        }  # fmt: skip
    return {
        f"{name}.weight": torch.randn(shape) * 0.3 if len(shape) == 2 else 1 + 0.2 * torch.randn(shape)
        for name, shape in shapes.items()
    }


def write_llama2c(
    path: Path, w: dict[str, Tensor], sizes: tuple[int, ...] = (DIM, HIDDEN, LAYERS, HEADS, KV, VOCABULARY, LENGTH)
) -> None:
    """A version-0 file, as llama2.c's export writes it."""
    dim, hidden, layers, heads, kv, vocabulary, length = sizes
    tied = "output.weight" not in w
    order = ["tok_embeddings"]
    for name in ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm",
                 "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):  # fmt: skip
        order += [f"layers.{i}.{name}" for i in range(layers)]
    order += ["norm"]
    size = dim // heads
    angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, size, 2) / size))
    with path.open("wb") as file:
        file.write(struct.pack("<7i", dim, hidden, layers, heads, kv, vocabulary if tied else -vocabulary, length))
        for name in order:
            file.write(w[f"{name}.weight"].numpy().astype("<f4").tobytes())
        file.write(np.cos(angles).astype("<f4").tobytes() + np.sin(angles).astype("<f4").tobytes())
        if not tied:
            file.write(w["output.weight"].numpy().astype("<f4").tobytes())


def write_pieces(path: Path, extra: list[str]) -> None:
    """A tokenizer.bin: special ones, bytes, and pieces with falling scores."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), *extra]
    with path.open("wb") as file:
        file.write(struct.pack("<i", max(len(piece.encode()) for piece in pieces)))
        for number, piece in enumerate(pieces):
            data = piece.encode()
            file.write(struct.pack("<fi", -float(max(number - 259, 0)), len(data)) + data)


@pytest.fixture
def pieces(tmp_path: Path) -> list[str]:
    extra = ["he", "ll", " he", "llo", " hello", *" helowrdé", "or", "wor", "ld"]
    extra += [chr(0x4E00 + i) for i in range(VOCABULARY - 259 - len(extra))]
    write_pieces(tmp_path / "tokenizer.bin", extra)
    return extra


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c(tied: bool, tmp_path: Path, convert: Convert, pieces: list[str]) -> None:
    w = drawn(tied=tied)
    write_llama2c(tmp_path / "tiny.bin", w)
    model: Any = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "tiny.bin", "huggingface")).double()
    ids = torch.randint(0, VOCABULARY, (12,))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    torch.testing.assert_close(logits, forward(w, ids.tolist(), HEADS, KV, 1e-5, 10000.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_meta(count: int, tmp_path: Path, convert: Convert, made: MakeRun) -> None:
    w = drawn(tied=False)
    folder = tmp_path / "meta"
    folder.mkdir()
    sideways = ("tok_embeddings", "attention.wo", "feed_forward.w2")  # Llama 2's pieces of these stand side by side
    for number in range(count):
        part = {}
        for name, value in w.items():
            along = 1 if any(one in name for one in sideways) else 0
            part[name] = value if value.dim() == 1 else value.chunk(count, along)[number].clone()
        part["rope.freqs"] = torch.ones(3)
        torch.save(part, folder / f"consolidated.{number:02d}.pt")
    params = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV, "norm_eps": 1e-6, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({**params, "rope_theta": 500.0}))
    tokenizer: tuple[str | Path, ...] = ("--run", made("lora").path)
    if (DATA / "llama_vicuna_tokenizer.model").is_file():
        shutil.copy(DATA / "llama_vicuna_tokenizer.model", folder / "tokenizer.model")
        tokenizer = ()
    model: Any = AutoModelForCausalLM.from_pretrained(convert(folder, "huggingface", *tokenizer)).double()
    ids = torch.randint(0, VOCABULARY, (12,))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    torch.testing.assert_close(logits, forward(w, ids.tolist(), HEADS, KV, 1e-6, 500.0), rtol=1e-5, atol=1e-5)


def by_llama2c(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    """llama2.c's encode: characters (or their bytes), then the best-scored pair of neighbours is joined, again and
    again.
    """
    tokens: list[int] = []
    for character in (" " + text if text else "").replace(" ", "▁"):
        tokens += [ids[character]] if character in ids else [3 + byte for byte in character.encode()]
    names = {number: piece for piece, number in ids.items()}
    while True:
        best, where = -1e10, -1
        for place in range(len(tokens) - 1):
            joint = ids.get(names[tokens[place]] + names[tokens[place + 1]])
            if joint is not None and scores[joint] > best:
                best, where = scores[joint], place
        if where < 0:
            return [1, *tokens]
        tokens[where : where + 2] = [ids[names[tokens[where]] + names[tokens[where + 1]]]]


@needs_data
@settings(max_examples=150, deadline=None)
@given(st.text(st.one_of(st.sampled_from(" etaoinshrdlu.,TLOS\n"), st.characters(codec="utf-8")), max_size=40))
def test_the_tokenizer_reads_what_llama2c_reads(text: str) -> None:
    found, scores = read_pieces(PIECES, 512)
    ids = {piece: number for number, piece in enumerate(found)}
    if any(mark in text for mark in ("<s>", "</s>", "<unk>", "▁", "\0")):
        return  # transformers reads these words as special tokens, and ▁ as a space
    tokenizer = stories_tokenizer()
    assert tokenizer(text).input_ids == by_llama2c(text, ids, scores)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def stories_tokenizer(known: list[Any] = []) -> Any:  # noqa: B006  built once
    if not known:
        known.append(read_tokenizer(PIECES, 512))
    return known[0]


@needs_data
def test_it_writes_a_story(tmp_path: Path, convert: Convert) -> None:
    for file in (STORIES, PIECES):
        shutil.copy(file, tmp_path / file.name)
    folder = convert(tmp_path / STORIES.name, "huggingface")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    start = torch.tensor([[tokenizer.bos_token_id]])
    written = model.generate(start, max_new_tokens=150, do_sample=False)
    story = tokenizer.decode(written[0], skip_special_tokens=True)
    assert story.startswith("Once upon a time, there was a little girl named Lily.")
    words = re.findall(r"[A-Za-z']+", story)
    common = {"the", "a", "to", "and", "was", "she", "her", "it", "in", "lily", "with", "said", "he", "they", "day"}
    assert len(words) > 60 and sum(word.lower() in common for word in words) > len(words) / 3
    raw = np.fromfile(STORIES, "<f4", offset=28)
    with torch.no_grad():
        logits = model.double()(written[:, :20]).logits[0]
    expected = forward(stories(raw), written[0, :20].tolist(), 8, 4, 1e-5, 10000.0)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def stories(raw: np.ndarray) -> dict[str, Tensor]:
    """stories260K.bin by Meta's names: dim 64, hidden 172, 5 layers, 8 heads, 4 of keys, vocabulary 512."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("tok_embeddings", (512, 64))]
    for name, shape in {
        "attention_norm": (64,), "attention.wq": (64, 64), "attention.wk": (32, 64), "attention.wv": (32, 64),
        "attention.wo": (64, 64), "ffn_norm": (64,), "feed_forward.w1": (172, 64), "feed_forward.w2": (64, 172),
        "feed_forward.w3": (172, 64),
    }.items():  # fmt: skip
        shapes += [(f"layers.{i}.{name}", shape) for i in range(5)]
    found, place = {}, 0
    for name, shape in [*shapes, ("norm", (64,))]:
        found[f"{name}.weight"] = torch.from_numpy(raw[place : place + int(np.prod(shape))].copy()).view(shape)
        place += int(np.prod(shape))
    return found


def test_what_is_refused(tmp_path: Path, refused: Callable[..., str], pieces: list[str]) -> None:
    file = tmp_path / "tiny.bin"
    write_llama2c(file, drawn(tied=True))
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    assert "its header asks for" in refused(file, "huggingface")
    file.write_bytes(whole)
    write_pieces(tmp_path / "tokenizer.bin", pieces[:-1])
    assert "is no tokenizer of a model with 300 tokens" in refused(file, "huggingface")
    (tmp_path / "tokenizer.bin").unlink()
    assert "has no tokenizer.bin" in refused(file, "huggingface")
    file.write_bytes(struct.pack("<I", 0x616B3432) + whole)
    assert "version 1 or 2" in refused(file, "huggingface")
    (tmp_path / "meta").mkdir()
    torch.save(drawn(tied=False), tmp_path / "meta" / "consolidated.00.pt")
    (tmp_path / "meta" / "params.json").write_text('{"dim": 24, "n_layers": 2}')
    assert "params.json: cannot be read" in refused(tmp_path / "meta", "huggingface")
