"""Moments of bitsandbytes' 8-bit Adam (arXiv 2110.02861) as fp32 numbers and back.

It keeps a moment of a flat tensor as one code per element and the largest magnitude of each block of 256 elements:
value = map[code] · magnitude. Written out and packed again over the same blocks, a moment is the same to the last bit
of fp32; other blocks (another world size or ZeRO stage) round it once to 8 bits. A second moment that is not 0 never
becomes 0 by that: the element's next step, divided by its root, would be hundreds of times too wide. Tensors below 4096
elements it keeps in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # elements, fixed in bitsandbytes
NUMBER = {"exp_avg": 1, "exp_avg_sq": 2}  # in the names of its state: state1, absmax1, qmap1, …
UNPACKED = "unpacked"

State = dict[str, Any]


def create(optimizer: Any, tensor: Tensor) -> None:
    """Creates the state of a tensor the optimizer steps on."""
    group = optimizer.param_groups[0]
    kept, group["params"] = group["params"], [tensor]  # where it looks for its settings
    optimizer.init_state(group, tensor, 0, 0)
    group["params"] = kept


def read(state: State, name: str, start: int, count: int) -> Tensor:
    """Elements start … start + count of a moment, in fp32."""
    number = NUMBER[name]
    held = state[f"state{number}"].view(-1)[start : start + count]
    if held.dtype == torch.float32:
        return held
    blocks = torch.arange(start, start + count, device=held.device) // BLOCK
    return state[f"qmap{number}"][held.long()] * state[f"absmax{number}"][blocks]


def unpacked(state: State, name: str) -> Tensor:
    """The moment as an fp32 tensor to write to; `pack` puts it into its place."""
    held = state[f"state{NUMBER[name]}"]
    if held.dtype == torch.float32:
        return held
    return state.setdefault(UNPACKED + name, torch.zeros(held.shape, device=held.device))


def pack(state: State) -> None:
    """Rounds what has been written to `unpacked` to codes."""
    for name, number in NUMBER.items():
        written = state.pop(UNPACKED + name, None)
        if written is not None:
            codes, magnitudes = packed(written, state[f"qmap{number}"])
            state[f"state{number}"].copy_(codes)
            state[f"absmax{number}"].copy_(magnitudes)


def packed(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, of the shape of `values`, and the magnitude of each block.

    Args:
        levels: [256] ascending, from at most 0 to 1; negative ones end above -1.
    """
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    # The largest magnitude of a block became the outermost level of its sign.
    magnitudes = blocks.amax(1) / levels[-1]
    if levels[0] < 0:
        magnitudes = torch.maximum(magnitudes, blocks.amin(1) / levels[0])
    relative = (blocks / magnitudes[:, None]).nan_to_num(0.0)
    codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
    if levels[0] >= 0:  # second moments
        codes = torch.where(relative > 0, codes.clamp(min=int((levels <= 0).sum())), codes)
    codes = codes.to(torch.uint8)
    return codes.view(-1)[: len(flat)].view(values.shape), magnitudes
