"""What is trained of a pretrained part: nothing, everything, or low-rank adapters."""

from __future__ import annotations

from typing import Literal

from peft import LoraConfig, inject_adapter_in_model
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import WavLMModel

from sharding.errors import UserError

Tuning = Literal["frozen", "full", "lora"]


class LoraSettings(BaseModel):
    """Low-rank adaptation (LoRA, arXiv 2106.09685) through PEFT."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(8, ge=1, description="Rank r of the update B·A.")
    alpha: int = Field(16, gt=0, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        min_length=1,
        description="Names of the linear layers that get an adapter.",
    )


# transformers' WavLM reads the weights of its attention without calling these layers.
WAVLM_UNCALLED = {"q_proj", "k_proj", "v_proj", "out_proj"}
OUTPUT = {"lm_head"}  # a language model's output layer: it serves decoding, no loss reaches it


def apply_tuning(model: nn.Module, tuning: Tuning, lora: LoraSettings, *, where: str) -> None:
    """Sets requires_grad of `model` in place and injects LoRA layers where asked.

    Args:
        where: the recipe key of the part, for messages.

    Raises:
        UserError: LoRA targets that do not exist, or that would never be trained.
    """
    model.requires_grad_(tuning == "full")
    if tuning != "lora":
        return
    refuse_targets(model, lora.target_modules, where=f"{where}.lora.target_modules")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def refuse_targets(model: nn.Module, targets: list[str], *, where: str) -> None:
    """Checks that every target is a linear layer of the model whose adapter gets a gradient.

    Raises:
        UserError: one is not.
    """
    untrainable = WAVLM_UNCALLED if isinstance(model, WavLMModel) else OUTPUT
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    remedy = f"Choose among {', '.join(sorted({name.rsplit('.', 1)[-1] for name in linear} - untrainable))}."
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown:
        raise UserError(where, f"{', '.join(unknown)}: no linear layer of this model has that name", remedy)
    dead = [target for target in targets if target.rsplit(".", 1)[-1] in untrainable]
    if dead:
        raise UserError(where, f"{', '.join(dead)}: an adapter there would never be trained", remedy)
