"""Quantised linear layers without data, as bitsandbytes leaves them after loading."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.quantise import bitsandbytes

BLOCK, NESTED_BLOCK = 64, 256  # weights per scale of NF4; scales per scale of scales


def finish_quantised(model: nn.Module) -> None:
    """Gives the quantised layers of a model built on the meta device the weights they would have, in place.

    (bitsandbytes quantises when weights reach a device; the meta device is none to it.)
    """
    # It would tell of every layer that inputs are cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for layer in quantised_layers(model):
        layer.planned_scales = int8(layer) if hasattr(layer, "init_8bit_state") else nf4(layer)


def quantised_layers(model: nn.Module) -> list[Any]:
    """bitsandbytes' own layers, without the adapters around them."""
    return [layer for layer in model.modules() if type(layer).__module__.startswith("bitsandbytes.")]


def scale_bytes(model: nn.Module) -> int:
    """Bytes of the scales of quantised layers, which are no parameters."""
    scales = [scale for layer in quantised_layers(model) for scale in layer.planned_scales]
    return sum(scale.numel() * scale.element_size() for scale in scales)


def int8(layer: Any) -> list[Tensor]:
    """One byte per weight, one fp32 scale per row."""
    codes = meta(layer.out_features, layer.in_features, dtype=torch.int8)
    scale = meta(layer.out_features, dtype=torch.float32)
    kind = bitsandbytes().nn.Int8Params
    layer.weight = kind(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
    return [scale]


def nf4(layer: Any) -> list[Tensor]:
    """Half a byte per weight, one byte per block of 64, one fp32 number per 256 of these."""
    package = bitsandbytes()
    count = layer.out_features * layer.in_features
    blocks = -(-count // BLOCK)
    state = package.functional.QuantState
    codes, absmax = meta(-(-count // 2), 1, dtype=torch.uint8), meta(blocks, dtype=torch.uint8)
    nested = meta(-(-blocks // NESTED_BLOCK), dtype=torch.float32)
    table, nested_table, offset = (meta(*size, dtype=torch.float32) for size in ((16,), (256,), ()))
    layer.weight = package.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state(
            absmax=absmax,
            shape=torch.Size((layer.out_features, layer.in_features)),
            code=table,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=layer.compute_dtype,
            offset=offset,
            state2=state(absmax=nested, code=nested_table, blocksize=NESTED_BLOCK, dtype=torch.float32),
        ),
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    return [absmax, nested, table, nested_table, offset]


@contextmanager
def products_on_cpu() -> Iterator[None]:
    """While active, int8 layers that are trained through multiply as they do on a CPU: in 16 bits."""
    functions: Any = sys.modules.get("bitsandbytes.autograd._functions")
    if functions is None:
        yield
        return
    kept, functions.MatMul8bitLt = functions.MatMul8bitLt, functions.MatMul8bitFp
    try:
        yield
    finally:
        functions.MatMul8bitLt = kept


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")
