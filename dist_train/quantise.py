"""Frozen linear layers in 8 or 4 bits (bitsandbytes), while a model is loaded or in memory."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from sharding.errors import UserError

Quantisation = Literal["none", "int8", "nf4"]

BLOCK = 64  # weights that share a scale in NF4


def bitsandbytes() -> Any:
    """The package, imported when first needed."""
    # On a CPU it warns that it found no faster kernel on the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes as package  # noqa: PLC0415  takes seconds

    return package


def loading_config(quantisation: Quantisation, int8_threshold: float, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What `from_pretrained` needs to quantise layer by layer while it reads: the whole model is never held in `dtype`.

    NF4 as in QLoRA (arXiv 2305.14314 §3): blocks of 64 weights, their scales quantised again.
    """
    if quantisation == "none":
        return None
    if quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quantise(
    model: nn.Module, quantisation: Quantisation, int8_threshold: float, dtype: torch.dtype, *, skip: set[str]
) -> None:
    """Replaces the linear layers of a model in memory by quantised ones, for a model that no file holds.

    (transformers' `replace_with_bnb_linear` leaves the weights to be loaded.)

    Args:
        dtype: of the arithmetic.
        skip: last part of the names of layers to leave.
    """
    if quantisation == "none":
        return
    for name, layer in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if type(layer) is nn.Linear and own not in skip:
            setattr(model.get_submodule(parent), own, quantised(layer, quantisation, int8_threshold, dtype))
    setattr(model, "is_loaded_in_8bit" if quantisation == "int8" else "is_loaded_in_4bit", True)  # PEFT asks for it


def quantised(layer: nn.Linear, quantisation: Quantisation, int8_threshold: float, dtype: torch.dtype) -> nn.Linear:
    """The layer's weight in 8 or 4 bits, frozen; its bias as it is."""
    package = bitsandbytes()
    shape: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    device = layer.weight.device
    if quantisation == "int8":
        new = package.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=False, threshold=int8_threshold, **shape
        )
        # From the CPU: Int8Params quantises on its way to a GPU, not what is there already.
        start = layer.weight.data.cpu() if layer.weight.is_cuda else layer.weight.data
        weight = package.nn.Int8Params(start, requires_grad=False, has_fp16_weights=False)
    else:
        new = package.nn.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=dtype, quant_type="nf4", **shape
        )
        weight = package.nn.Params4bit(layer.weight.data.to(dtype), requires_grad=False, quant_type="nf4", module=new)
    new.weight = weight.to(device)  # which quantises it
    if layer.bias is not None:
        new.bias = layer.bias
    return new


def check_quantised(model: nn.Module, quantisation: Quantisation, *, where: str) -> None:
    """Looks at what has been loaded or quantised, and makes 4-bit layers the same in training and evaluation.

    Args:
        where: recipe key of the part.

    Raises:
        UserError: the files hold the model quantised in another way than the recipe says; or it has layers that
            bitsandbytes cannot compute on a CPU.
    """
    kinds = {type(layer).__name__ for layer in model.modules()}
    found = "int8" if "Linear8bitLt" in kinds else "nf4" if "Linear4bit" in kinds else "none"
    if found != quantisation:
        raise UserError(
            f"{where}.quantisation",
            f"is {quantisation}, but the files of {where}.pretrained hold a model quantised to {found}",
            f"Write {where}.quantisation: {found}, or give the model in bf16.",
        )
    for name, layer in model.named_modules():
        if type(layer).__name__ != "Linear4bit":
            continue
        if int(layer.in_features) % BLOCK and not torch.cuda.is_available():
            # bitsandbytes 0.50.2 cuts each row into blocks there, but quantised the rows as one: about 90 % error.
            raise UserError(
                f"{where}.quantisation",
                f"is nf4, on a CPU only for layers with a multiple of {BLOCK} inputs; {name} has {layer.in_features}",
                f"Write {where}.quantisation: int8, or use a model of such widths.",
            )
        # On a CPU evaluation would pack the weights anew, in place, for a kernel that has no gradient and rounds to
        # bf16: what is evaluated would not be what is trained, nor could training go on.
        layer.support_avx512bf16_for_cpu = False
