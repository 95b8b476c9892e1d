"""Runs whose weights were drawn, not trained: what a conversion reads, beside the model it must agree with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, WavLMConfig, WavLMModel

from dist_train.batch import Batch, Collator
from dist_train.build import build_collator, build_model, fit_to_dataset, open_split
from dist_train.llm import Block, load_tokenizer
from dist_train.model import DoubleFlow
from dist_train.packed import Tokens
from dist_train.recipe import Recipe, write_recipe
from dist_train.tokenizer import train_tokenizer
from sharding import portable
from sharding.checkpoint import scales, trainables
from sharding.portable import Portable
from tests import tiny

WIDTH = 64  # NF4 wants a multiple of it on a CPU


@dataclass
class Made:
    """A run and its model in evaluation mode, the best checkpoint's weights in it."""

    path: Path
    recipe: Recipe
    model: DoubleFlow

    @property
    def best(self) -> Path:
        return (self.path / "checkpoints" / "best").resolve()


def bases(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """Folders of a tiny Llama with its tokenizer and of a tiny WavLM, weights far from small."""
    tokenizer = train_tokenizer([" ".join(tiny.WORDS)] * 3, 320)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=0,
            eos_token_id=1, tie_word_embeddings=False, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    config = tiny.recipe(Path("none")).audio.config
    assert config is not None
    wavlm = WavLMModel(WavLMConfig(**{**config, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}))
    found = {"llm": folder / "llama", "audio": folder / "wavlm"}
    models: dict[str, Any] = {"llm": llama, "audio": wavlm}
    for name, model in models.items():
        enlarge(model)
        model.to(dtype).save_pretrained(found[name])
    tokenizer.save_pretrained(found["llm"])
    return found


def enlarge(model: nn.Module) -> None:
    """Weights so large that all of them matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)


def make_run(path: Path, shards: Path, **changes: Any) -> Made:
    """A run directory with one checkpoint of random weights and moments."""
    recipe = fit_to_dataset(tiny.recipe(shards, **changes))
    name = recipe.text.pretrained
    path.mkdir(parents=True)
    tokenizer = load_tokenizer(name) if name else train_tokenizer([" ".join(tiny.WORDS)] * 3, 320)
    tokenizer.save_pretrained(path / "tokenizer")
    write_recipe(recipe, path / "recipe.yaml")
    model = build_model(recipe, tokenizer).eval()
    trained = trainables(model)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif parameter.dim() == 2 or "lambda" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {name: parameter.detach().float() for name, parameter in trained.items()}
    moments = {
        f"{kind}.{name}": torch.rand_like(x) for name, x in weights.items() for kind in ("exp_avg", "exp_avg_sq")
    }
    state = {"format": portable.FORMAT, "adam_step": 7, "seed": recipe.seed, "bases": fingerprints(model)}
    directory = path / "checkpoints" / "step_00000007"
    portable.write(directory, weights.items(), moments.items(), state)
    (directory.parent / "best").symlink_to(directory.name)
    return Made(path, recipe, model)


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Of each part's frozen weights, as a run writes them into its checkpoints."""
    frozen: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    found: dict[str, Any] = {}
    for name, value in sorted({**frozen, **scales(model)}.items()):
        total = found.setdefault(name.split(".")[0], hashlib.sha256())
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {part: total.hexdigest() for part, total in found.items()}


def filled(made: Made, checkpoint: Path) -> DoubleFlow:
    """The run's model with another checkpoint's weights, as `dist-train evaluate --checkpoint` loads it."""
    model = build_model(made.recipe, load_tokenizer(str(made.path / "tokenizer")), resumed=True).eval()
    held = Portable(checkpoint)
    trained = trainables(model)
    assert held.names("model") == sorted(trained)
    for name, parameter in trained.items():
        parameter.data.copy_(held.tensor("model", name))
    return model


def collated(made: Made) -> Batch:
    """A batch of the run's training clips."""
    split = open_split(made.recipe, "train")
    collate: Collator = build_collator(made.recipe, load_tokenizer(str(made.path / "tokenizer")), made.model)
    return collate([{**split[i], "index": i, "real": True} for i in range(6)])


@torch.no_grad()
def predictions(model: DoubleFlow, made: Made) -> Tensor:
    """[2, B] of both flows over a batch."""
    flows = model(collated(made))
    return torch.stack([flows.complete.prediction, flows.missing.prediction])


@torch.no_grad()
def our_logits(model: DoubleFlow, ids: Tensor) -> Tensor:
    """ids [B, L] → logits [B · L, V] of our packed pass, adapters and all."""
    (read,) = model.llm.read([Block(None, Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))])
    logits: Tensor = model.llm.causal.get_output_embeddings()(read.states[-1])
    return logits


@torch.no_grad()
def our_states(model: DoubleFlow, waveform: Tensor) -> Tensor:
    """waveform [B, S] → hidden states of our WavLM [layers + 1, B, T, D], the last one after the final norm."""
    output = model.audio.wavlm(waveform, output_hidden_states=True)  # type: ignore[operator]
    return torch.stack([*output.hidden_states[:-1], output.last_hidden_state])


@torch.no_grad()
def stock_states(model: Any, waveform: Tensor) -> Tensor:
    """The same of transformers' own."""
    output = model.eval()(waveform, output_hidden_states=True)
    return torch.stack([*output.hidden_states[:-1], output.last_hidden_state])


MakeRun = Callable[..., Made]
