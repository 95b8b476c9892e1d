"""Low-rank adapters merged into the weights they stand beside: LoRA, DoRA, VeRA."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.quantise import bitsandbytes

# What PEFT adds to the name of the module an adapter wraps, and what its files have of that.
PIECES = {
    "lora_A.default.weight": "lora_A.weight",
    "lora_B.default.weight": "lora_B.weight",
    "lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    "vera_lambda_b.default": "vera_lambda_b",
    "vera_lambda_d.default": "vera_lambda_d",
}


class Projections(NamedTuple):
    """VeRA's shared random matrices: A [r, largest input], B [largest output, r]."""

    a: Tensor
    b: Tensor


def piece_of(name: str) -> tuple[str, str] | None:
    """`X.lora_A.default.weight` → (X, lora_A.default.weight); None for a weight that is no adapter's."""
    for piece in PIECES:
        if name.endswith(f".{piece}"):
            return name.removesuffix(f".{piece}"), piece
    return None


def by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Adapters among the names: module → piece → name."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        split = piece_of(name)
        if split:
            found.setdefault(split[0], {})[split[1]] = name
    return found


def draw_projections(config: Any, inputs: int, outputs: int) -> Projections:
    """VeRA's projections, which PEFT draws from the configuration's seed, for the largest adapted layer."""
    bitsandbytes()
    from peft import VeraConfig, VeraModel  # noqa: PLC0415  takes seconds

    layer = nn.ModuleDict({"layer": nn.Linear(inputs, outputs, bias=False)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the projections hang on the seed
        own = VeraConfig(
            r=config.r, target_modules=["layer"], projection_prng_key=config.projection_prng_key, save_projection=False
        )
    model = VeraModel(layer, own, "default")
    return Projections(model.vera_A["default"].detach(), model.vera_B["default"].detach())


def scale_of(config: Any) -> float:
    """What LoRA's product B·A is multiplied by."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def merged(weight: Tensor, pieces: dict[str, Tensor], config: Any, projections: Projections | None) -> Tensor:
    """The layer's weight with its adapter in it, in fp32 or better.

    Args:
        weight: [out, in] of the base.
        pieces: as in PIECES.
        config: PEFT's.
        projections: of VeRA.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(exact)
    piece = {name.split(".")[0]: x.to(exact) for name, x in pieces.items()}
    if "vera_lambda_b" in piece:
        assert projections is not None
        outputs, inputs = weight.shape
        a, b = projections.a[:, :inputs].to(exact), projections.b[:outputs].to(exact)
        return weight + (piece["vera_lambda_b"][:, None] * b) @ (piece["vera_lambda_d"][:, None] * a)
    weight = weight + scale_of(config) * piece["lora_B"] @ piece["lora_A"]
    if "lora_magnitude_vector" in piece:  # DoRA (arXiv 2402.09353 eq. 5)
        weight = weight * (piece["lora_magnitude_vector"] / weight.norm(dim=1))[:, None]
    return weight
