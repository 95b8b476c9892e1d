"""What the ranks of test_wavlm do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dist_train.audio import AudioEncoder, AudioSettings
from dist_train.build import build_model, fit_to_dataset
from dist_train.evaluate import find_checkpoint
from dist_train.llm import load_tokenizer
from sharding.portable import Portable
from sharding.zero import ZeroSettings, build_engine
from tests import tiny
from tests.work import fit, new_run

SHARDED = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


class Regression(nn.Module):
    """WavLM and a fixed readout."""

    def __init__(self, settings: AudioSettings) -> None:
        super().__init__()
        self.audio = AudioEncoder(settings, minimum_frames=1, needs_last=True)

    def forward(self, waveform: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        states = self.audio(waveform, mask)
        heard = states.mask[..., None]
        means = (states.last * heard).sum(1) / heard.sum(1)
        return (means - target).square().mean()


def built_whole(folder: Path) -> dict[str, Any]:
    """Losses of a few steps with LoRA on WavLM's projections, and how far each adapter tensor went."""
    return {
        "2": train(ZeroSettings(stage=2, persistence_threshold=0)),
        "3": train(ZeroSettings(stage=3, persistence_threshold=0)),
        "3 checkpointed": train(ZeroSettings(stage=3, persistence_threshold=0), activation_checkpointing=True),
    }


def train(zero: ZeroSettings, **changes: Any) -> dict[str, Any]:
    """One run; its batches differ by rank, its start does not."""
    torch.manual_seed(0)
    settings = AudioSettings.model_validate(
        {
            "config": tiny.recipe(Path("none")).audio.config,
            "layer": 1,
            "tuning": "lora",
            "lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"], "rank": 4, "alpha": 64},
            **changes,
        }
    )
    live = HfDeepSpeedConfig(SHARDED) if zero.stage == 3 else None
    inside: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=SHARDED) if live else nullcontext()
    with inside:
        model = Regression(settings)
    unset_hf_deepspeed_config()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(adapters.values(), lr=1e-2)
    engine = build_engine(model, optimizer, zero, micro_batch=2, accumulation=1, clip_norm=0.0, bf16=False)
    before = whole(adapters)

    generator = torch.Generator().manual_seed(dist.get_rank())
    waveform = torch.randn(2, 6000, generator=generator)
    mask = torch.arange(6000) < torch.tensor([[6000], [3500]])
    target = torch.randn(2, 16, generator=generator)
    losses = []
    for _ in range(8):
        loss = engine(waveform, mask, target)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    after = whole(adapters)
    return {"losses": losses, "moved": {name: (after[name] - before[name]).norm().item() for name in after}}


def whole(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of parameters that may be sharded."""
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def adapted(folder: Path, data: str) -> dict[str, Any]:
    """Runs with LoRA on all projections of WavLM's attention: losses, and which adapter tensors moved."""
    found = {}
    for stage in (2, 3):
        recipe = fit_to_dataset(
            tiny.recipe(
                Path(data),
                audio={"tuning": "lora", "lora": {"rank": 2}, "layer": -1},
                optimizer={"learning_rate": 1e-3},
                training={"epochs": 4, "check_agreement_steps": 2},
                zero={"stage": stage},
            )
        )
        run = new_run(recipe, folder / f"stage{stage}")
        losses = fit(recipe, run)
        start = build_model(recipe, load_tokenizer(str(run.tokenizer))).state_dict()
        saved = dict(Portable(find_checkpoint(run, "last")).tensors("model"))
        moved = {name: bool((value != start[name]).any()) for name, value in saved.items() if "audio" in name}
        found[str(stage)] = {"losses": losses, "moved": {name: hit for name, hit in moved.items() if "lora_" in name}}
    return found
