"""What the ranks of the tests of adapters, census and compatibility rules do."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, WavLMConfig, WavLMModel

from dist_train.adapters import TuningSettings, apply_tuning
from dist_train.build import build_model, build_training
from dist_train.optimizer import OptimizerSettings, build_optimizer
from dist_train.parameter_table import parameter_rows, write_parameters
from dist_train.parameter_table import parameter_table as rich_table
from dist_train.tokenizer import train_tokenizer
from sharding import checkpoint
from sharding.census import Census
from sharding.collectives import gather_objects
from sharding.engine_state import MOMENTS, adam, moment
from sharding.errors import UserErrors
from sharding.portable import Portable
from sharding.zero import ZeroSettings, build_engine
from tests import tiny
from tests.saved import save

TOKENS = 50
WIDE_TEXT = {"config": {"hidden_size": 64, "intermediate_size": 64}}  # bitsandbytes' NF4 on a CPU wants 64


def llama() -> Any:
    """A tiny language model."""
    return LlamaForCausalLM(LlamaConfig(**(tiny.recipe(Path("none")).text.config or {}), vocab_size=TOKENS))


def stock_wavlm() -> Any:
    """A tiny WavLM of transformers, whose attention reads the weights of its projections without running them."""
    return WavLMModel(
        WavLMConfig(**(tiny.recipe(Path("none")).audio.config or {}), apply_spec_augment=False, layerdrop=0.0)
    )


class Hears(nn.Module):
    """A WavLM and a head."""

    def __init__(self, tuning: str, targets: list[str] | None) -> None:
        super().__init__()
        self.wavlm = stock_wavlm()
        apply_tuning(self.wavlm, TuningSettings(tuning=tuning, **{tuning: {"target_modules": targets}}), where="audio")
        self.wavlm.feature_extractor._freeze_parameters()
        self.head = nn.Linear(16, 1)

    def forward(self, step: int) -> Tensor:
        return self.head(self.wavlm(torch.randn(2, 2000)).last_hidden_state).square().mean()


class Reads(nn.Module):
    """A language model and a head."""

    def __init__(self, tuning: str) -> None:
        super().__init__()
        self.llm = llama()
        apply_tuning(self.llm, TuningSettings(tuning=tuning, vera={"rank": 8}), where="text")
        self.llm.lm_head.requires_grad_(False)
        self.head = nn.Linear(16, 1)

    def forward(self, step: int) -> Tensor:
        return self.head(self.llm.model(torch.randint(TOKENS, (2, 5))).last_hidden_state).square().mean()


class Branches(nn.Module):
    """A stem and a branch whose share in the loss is as planted."""

    def __init__(self, planted: str) -> None:
        super().__init__()
        self.stem, self.branch, self.planted = nn.Linear(3, 3), nn.Linear(3, 3), planted

    def forward(self, step: int) -> Tensor:
        x = self.stem(torch.randn(2, 3))
        branch, first = self.branch(x), dist.get_rank() == 0
        if self.planted == "detached":
            branch = branch.detach()
        elif self.planted == "zero":
            branch = branch * 0
        elif self.planted == "zero at first":
            branch = branch * min(step, 1)
        elif self.planted == "zero on one rank":
            branch = branch * float(first)
        elif self.planted == "infinite on one rank" and not first:
            branch = branch * torch.inf
        return (x + branch).square().mean()


PLANTED: dict[str, Any] = {
    "lora": lambda: Reads("lora"),
    "dora": lambda: Reads("dora"),
    "vera": lambda: Reads("vera"),
    "full": lambda: Reads("full"),
    "lora heard": lambda: Hears("lora", ["intermediate_dense", "output_dense"]),
    "lora uncalled": lambda: Hears("lora", ["q_proj", "out_proj", "output_dense"]),
    "vera uncalled": lambda: Hears("vera", ["q_proj", "out_proj", "output_dense"]),
    **{
        planted: lambda planted=planted: Branches(planted)
        for planted in ("none", "detached", "zero", "zero at first", "zero on one rank", "infinite on one rank")
    },
}


def census(folder: Path, seed: int, stage: int) -> dict[str, Any]:
    """For each model what every rank's census said, and in which step it was done."""
    found = {}
    for name, build in PLANTED.items():
        torch.manual_seed(seed)
        model = build()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine = build_engine(
            model,
            build_optimizer(OptimizerSettings(learning_rate=0.01), trained),
            ZeroSettings(stage=stage, persistence_threshold=0),
            micro_batch=2,
            accumulation=1,
            clip_norm=0.0,
            bf16=False,
        )
        said, done = None, 0
        watch = Census(engine.module, steps=3)
        torch.manual_seed(seed + dist.get_rank())
        for step in range(5):
            engine.backward(engine(step))
            try:
                watch.after_backward(step)
            except UserErrors as errors:
                said = str(errors)
            engine.step()
            if not watch.hooks:
                done = step + 1
                break
        found[name] = gather_objects([said, done])
        engine.destroy()
    return found


class Wide(nn.Module):
    """Parameters whose sizes no block of 256 and no number of ranks divides, enough for moments in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(67, 91), nn.Linear(91, 33)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).square().mean()


def wide_engine(optimizer: str, zero: dict[str, Any], seed: int, bf16: bool, saved: Path | None = None) -> Any:
    """An engine around Wide, continued from a checkpoint if one is given."""
    torch.manual_seed(seed)
    model = Wide()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if bf16 else torch.float32)
    if saved is not None:
        checkpoint.load_weights(model, Portable(saved))
    settings = OptimizerSettings.model_validate({"name": optimizer, "learning_rate": 0.01, "weight_decay": 0.1})
    engine = build_engine(
        model,
        build_optimizer(settings, model.parameters()),
        ZeroSettings(**{"persistence_threshold": 0, **zero}),
        micro_batch=4,
        accumulation=1,
        clip_norm=0.0,
        bf16=bf16,
    )
    if saved is not None:
        checkpoint.load(engine, Portable(saved))
    return engine


def continued(engine: Any, seed: int, first: int, count: int) -> list[float]:
    """Losses of steps first … first + count, on numbers that are a function of seed, step and rank."""
    losses = []
    for step in range(first, first + count):
        draw = np.random.default_rng([seed, step, dist.get_rank()]).normal(size=(4, 67))
        loss = engine(torch.from_numpy(draw).to(engine.module.first.bias.dtype))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def moments_of(engine: Any) -> dict[str, Tensor]:
    """All moments, whole."""
    return {
        f"{which}.{name}": moment(engine, parameter, which).clone()
        for name, parameter in engine.module.named_parameters()
        for which in MOMENTS
    }


def resumed(
    folder: Path, seed: int, optimizer: str, bf16: bool, settings: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Each of the settings trained, saved and continued; each checkpoint loaded under each of the settings.

    Returns for each pair the largest difference of a moment, relative to the largest of its tensor, and of the next
    losses, relative, from the undisturbed run; whether a moment was held in 8 bits.
    """
    found = {}
    for before, zero in enumerate(settings):
        engine = wide_engine(optimizer, zero, seed, bf16)
        continued(engine, seed, 0, 3)
        saved = save(engine, folder / f"{optimizer}{bf16}{before}", 3)
        moments = moments_of(engine)
        undisturbed = continued(engine, seed, 3, 3)
        engine.destroy()
        for after, other in enumerate(settings):
            engine = wide_engine(optimizer, other, seed + 1, bf16, saved)
            states = list(adam(engine).state.values())
            restored = {
                name: float((value - moments[name]).abs().max() / moments[name].abs().max())
                for name, value in moments_of(engine).items()
            }
            losses = continued(engine, seed, 3, 3)
            found[f"{before} {after}"] = {
                "moments": max(restored.values()),
                "losses": max(abs(a - b) / b for a, b in zip(losses, undisturbed, strict=True)),
                "eight_bit": float(any(state["state1"].dtype == torch.uint8 for state in states if "state1" in state)),
            }
            engine.destroy()
    return found


def parameter_table(folder: Path, seed: int, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the parameter table of the double flow, for each change of the tiny recipe."""
    tokenizer = train_tokenizer([" ".join(tiny.WORDS)] * 3, 320)
    found = []
    for change in changes:
        recipe = tiny.recipe(Path("none"), seed=seed, widths={"vision": tiny.VISION_WIDTH}, **change)
        model = build_model(recipe, tokenizer)
        plain = build_model(tiny.recipe(Path("none"), widths={"vision": tiny.VISION_WIDTH}, text=WIDE_TEXT), tokenizer)
        engine = build_training(recipe, model, micro_batch=1)
        rows = parameter_rows(engine.module)
        shown = Console(width=200, record=True, file=io.StringIO())
        shown.print(rich_table(rows))
        if dist.get_rank() == 0:
            write_parameters(rows, folder / "parameters.json")
        adapters = sum(
            getattr(parameter, "ds_numel", parameter.numel())
            for name, parameter in engine.module.named_parameters()
            if "lora_" in name
        )
        found.append({
            "rows": [asdict(row) for row in rows],
            "shown": shown.export_text(),
            "parameters": sum(parameter.numel() for parameter in plain.parameters()) + adapters,
            "adapters": adapters,
        })  # fmt: skip
        engine.destroy()
    return found
