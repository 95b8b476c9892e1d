"""What stands in for kernels and layers while a step is traced, and what operations cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from sharding.ops import choose_accelerator

aten = torch.ops.aten
FULL = 4  # bytes per element of fp32
ALIGNED = 8  # elements to which CUDA's memory-efficient attention wants rows of its mask aligned


def cpu_attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """FLOPs of the CPU's fused attention, which torch's registry lacks."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def cpu_attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor) -> int:
    """FLOPs of its backward."""
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


FUSED_ON_CPU: dict[Any, tuple[Callable[..., int], int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: (cpu_attention_flops, 3),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (cpu_attention_backward_flops, 4),
}


# bitsandbytes' operations: bytes of the inputs that are multiplied, and the unit that hardware profiles know.
QUANTISED = {
    "bitsandbytes.int8_scaled_mm.default": "int8",
    "bitsandbytes.int8_mixed_scaled_mm.default": "int8_mixed",
    "bitsandbytes.gemm_4bit.default": "nf4",
}


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Floating point operations of one operation as torch counts them: those of matrix products and convolutions."""
    packet = func._overloadpacket
    if packet in FUSED_ON_CPU:
        count, tensors = FUSED_ON_CPU[packet]
        return int(count(*args[:tensors]))
    if str(func) in QUANTISED:
        product = result if isinstance(result, Tensor) else result[0]
        return 2 * args[0].shape[-1] * product.numel()
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0


def unit_of(func: Any, tensors: list[Tensor]) -> str:
    """Which unit runs an operation: `16` or `32` bits, or a quantised product."""
    if str(func) in QUANTISED:
        return QUANTISED[str(func)]
    return "32" if any(t.is_floating_point() and t.element_size() >= FULL for t in tensors) else "16"


def int8_rows(func: Any, matrix: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """bitsandbytes' quantisation of activations; how many columns are outliers hangs on data: none are assumed."""
    codes, scales, _ = func(matrix, threshold=0.0)
    return codes, scales, torch.empty(0, dtype=torch.long) if threshold else None


def int8_mixed(func: Any, matrix: Tensor, codes: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Its product, in which outlier columns are multiplied in 16 bits."""
    return matrix.new_empty(*codes.shape[:-1], weight.shape[0]), matrix.new_empty(codes.shape[0], 0)


# What runs instead of operations whose result's shape would hang on data.
SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "bitsandbytes.int8_vectorwise_quant.default": int8_rows,
    "bitsandbytes.int8_mixed_scaled_mm.default": int8_mixed,
}


def real_places(func: Any, args: Any) -> Any:
    """The operation's arguments, a mask that selects turned into positions: how many there are is then known."""
    if func is not aten.index.Tensor:
        return args
    places: list[Any] = []
    for index in args[1]:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta:
            places += index.nonzero(as_tuple=True)
        else:
            places.append(index)
    return args[0], places


@contextmanager
def replaced(*, cuda: bool, zero3: bool) -> Iterator[None]:
    """While active, torch.nn.functional's attention, dropout and linear are those of the device, which the meta device
    would not choose.

    CUDA: flash attention without a mask in 16 bits, else memory-efficient attention; dropout keeps a byte per element.
    CPU: a fused kernel unless weights are dropped or the mask is trained. No fused kernel keeps a T × T map beside the
    mask it is given. ZeRO-3: DeepSpeed's linear layers, which keep their input even if their weight is frozen.

    (A TorchFunctionMode would not do: it is not active in the backward pass, where checkpointed layers run again.)
    """
    names = ("scaled_dot_product_attention", "dropout", "linear")
    kept = {name: getattr(F, name) for name in names}
    setattr(F, names[0], partial(attention, kept[names[0]], cuda))
    if cuda:
        setattr(F, names[1], dropout)
    if zero3:
        choose_accelerator()
        from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: PLC0415  takes 2 s

        setattr(F, names[2], zero3_linear_wrap)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(F, name, function)


def attention(
    unfused: Any,
    cuda: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by the kernel that torch chooses."""
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    trained_mask = attn_mask is not None and attn_mask.requires_grad
    if not cuda and (dropout_p > 0 or trained_mask):
        return unfused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    if not cuda:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    if attn_mask is None and query.element_size() < FULL:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        surplus = -attn_mask.shape[-1] % ALIGNED
        if surplus:
            attn_mask = F.pad(attn_mask, (0, surplus))[..., :-surplus]
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    keep = torch.is_grad_enabled()
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale)[0]


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout by CUDA's fused kernel."""
    return aten.native_dropout(input, p, training)[0] if training and 0 < p < 1 else input
