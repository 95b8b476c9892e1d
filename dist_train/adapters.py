"""What is trained of a pretrained part: nothing, everything, or a low-rank adapter beside frozen weights."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from dist_train.quantise import Quantisation, bitsandbytes
from sharding.errors import UserError

Tuning = Literal["frozen", "full", "lora", "dora", "vera"]

# As Llama, speech encoders, Phi and GPT-NeoX name them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value")
OUTPUT = {"lm_head"}  # a language model's output layer: it serves decoding, no loss reaches it
TRAINED = ("lora_", "vera_lambda_")  # in the names of an adapter's parameters


class AdapterSettings(BaseModel):
    """What all adapters have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    rank: int = Field(8, ge=1, description="Rank r of the update B·A.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the linear layers that get an adapter. "
        "Default: the attention projections, q_proj, k_proj, v_proj and o_proj (out_proj in speech encoders).",
    )


class LoraSettings(AdapterSettings):
    """Low-rank adaptation (LoRA, arXiv 2106.09685) through PEFT."""

    alpha: int = Field(16, gt=0, description="Scale: the update is multiplied by alpha / rank.")


class DoraSettings(LoraSettings):
    """Weight-decomposed adaptation (DoRA, arXiv 2402.09353): LoRA on the direction of the weights, and one trained
    magnitude per output.
    """


class VeraSettings(AdapterSettings):
    """Vector-based random matrix adaptation (VeRA, arXiv 2310.11454): A and B are random, frozen and shared by all
    layers; each layer trains two vectors that scale them.
    """

    rank: int = Field(256, ge=1, description="Rank r of the shared projections; they are not trained, so it is large.")
    initial_scale: float = Field(0.1, gt=0, description="Start of the vector d (of r values); b starts at zero.")
    projection_seed: int = Field(0, ge=0, description="Seed of the shared projections: they are drawn, not stored.")


class TuningSettings(BaseModel):
    """How a pretrained part is held, and what of it is trained."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    tuning: Tuning = Field("frozen", description="`frozen`, `full`, or an adapter: `lora`, `dora`, `vera`.")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="Read when tuning is `lora`.")
    dora: DoraSettings = Field(default_factory=DoraSettings, description="Read when tuning is `dora`.")
    vera: VeraSettings = Field(default_factory=VeraSettings, description="Read when tuning is `vera`.")
    quantisation: Quantisation = Field(
        "none",
        description="Frozen linear layers in fewer bits (bitsandbytes): `int8` (LLM.int8, arXiv 2208.07339), "
        "`nf4` (4-bit, arXiv 2305.14314), or `none`. It saves memory, not time.",
    )
    int8_threshold: float = Field(
        6.0,
        ge=0,
        description="With `int8`: input columns with a value above it are multiplied in 16 bits; 0 = none are, which "
        "is faster and less exact.",
    )


def apply_tuning(model: nn.Module, settings: TuningSettings, *, where: str) -> None:
    """Sets requires_grad of `model` in place and injects adapters where asked.

    Args:
        where: the recipe key of the part, for messages.

    Raises:
        UserError: targets that do not exist, or that would never be trained.
    """
    tuning = settings.tuning
    model.requires_grad_(tuning == "full")
    if tuning in ("frozen", "full"):
        return
    adapter: LoraSettings | VeraSettings = getattr(settings, tuning)
    targets = check_targets(model, adapter.target_modules, where=f"{where}.{tuning}.target_modules")
    inject(model, adapter, targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))


def inject(model: nn.Module, adapter: LoraSettings | VeraSettings, targets: list[str]) -> None:
    """Wraps the targets in PEFT's layers."""
    config = peft_config(adapter, targets)
    from peft import LoraModel, VeraModel  # noqa: PLC0415  takes seconds

    (VeraModel if isinstance(adapter, VeraSettings) else LoraModel)(model, config, "default")


def peft_config(adapter: LoraSettings | VeraSettings, targets: list[str]) -> Any:
    """The settings as PEFT has them."""
    bitsandbytes()  # PEFT imports it
    from peft import LoraConfig, VeraConfig  # noqa: PLC0415  takes seconds

    if isinstance(adapter, VeraSettings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the projections hang on the seed
            return VeraConfig(
                r=adapter.rank,
                vera_dropout=adapter.dropout,
                target_modules=targets,
                d_initial=adapter.initial_scale,
                projection_prng_key=adapter.projection_seed,
                save_projection=False,
            )
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        use_dora=isinstance(adapter, DoraSettings),
    )


def cast_projections(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts VeRA's shared projections, which are buffers, to the type of the vectors that scale them."""
    for name, module in model.named_modules():
        if name.endswith(("vera_A", "vera_B")):
            module.to(dtype)


def check_targets(model: nn.Module, targets: list[str] | None, *, where: str) -> list[str]:
    """The layers to adapt, each a linear layer of the model that a loss can reach; None: its attention projections.

    Raises:
        UserError: one is not.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = {name.rsplit(".", 1)[-1] for name in linear}
    remedy = f"Choose among {', '.join(sorted(names - OUTPUT))}."
    if targets is None:
        targets = [name for name in ATTENTION if name in names]
        if not targets:
            raise UserError(where, f"this model has no layer named {', '.join(ATTENTION)}", remedy)
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown:
        raise UserError(where, f"{', '.join(unknown)}: no linear layer of this model has that name", remedy)
    dead = [target for target in targets if target.rsplit(".", 1)[-1] in OUTPUT]
    if dead:
        raise UserError(where, f"{', '.join(dead)}: an adapter there would never be trained", remedy)
    return targets
