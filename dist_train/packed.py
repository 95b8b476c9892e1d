"""One padding-free pass: segments of unequal length laid end to end, and attention that keeps them apart.

`pack` makes one sequence [1, N, H] of the real positions of padded blocks; transformers' attention interface calls
`attend`, which gets the segments as a keyword of the model's forward. Nothing is kept between calls, so a layer may be
computed again in the backward pass (activation checkpointing).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sharding.errors import UserError

NAME = "packed"  # of the attention implementation, in transformers' registry
LEAST_FILLED = 0.8  # of a group's width by its shortest segment: more groups cost launches, fewer cost padding


class TextStates(NamedTuple):
    """states [B, L, H] and mask [B, L] (True = real)."""

    states: Tensor
    mask: Tensor


class Tokens(NamedTuple):
    """ids [B, L] and mask [B, L] (True = real)."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Segments:
    """Where the segments lie in a packed sequence: their lengths (0 allowed), in order, and the device it is on.

    Args:
        staying: how many of them, from the first on, pass the layers of `leave_before`; default: all.
    """

    lengths: list[int]
    device: torch.device
    staying: int | None = None

    @cached_property
    def longest(self) -> int:
        """Length of the longest segment."""
        return max(self.lengths)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [S + 1]: start of each segment, and the end of the last."""
        return torch.from_numpy(np.cumsum([0, *self.lengths], dtype=np.int32)).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [1, N]: position of each token in its segment."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)[None]

    @cached_property
    def upper(self) -> Segments:
        """Those that stay."""
        return Segments(self.lengths[: self.staying], self.device)

    @cached_property
    def groups(self) -> Groups:
        """The segments as padded blocks of about equal length."""
        starts = np.cumsum([0, *self.lengths])
        blocks: list[list[int]] = []
        for segment in np.argsort(self.lengths, kind="stable")[::-1]:
            length = self.lengths[segment]
            if length == 0:
                break
            if blocks and length >= LEAST_FILLED * self.lengths[blocks[-1][0]]:
                blocks[-1].append(segment)
            else:
                blocks.append([segment])
        there, back, size = [], np.empty(starts[-1], dtype=np.int64), 0
        for block in blocks:
            columns = np.arange(self.lengths[block[0]])
            for segment in block:
                start, length = starts[segment], self.lengths[segment]
                # Behind its end a segment repeats its last position: causal attention never looks there.
                there.append(start + np.minimum(columns, length - 1))
                back[start : start + length] = size + columns[:length]
                size += len(columns)
        return Groups(
            [(len(block), self.lengths[block[0]]) for block in blocks],
            torch.from_numpy(np.concatenate(there)).to(self.device),
            torch.from_numpy(back).to(self.device),
        )


class Groups(NamedTuple):
    """shapes: (segments, width) of each padded block; there: index into the packed sequence that fills them all;
    back: index into the filled blocks, one behind the other, that restores the packed sequence.
    """

    shapes: list[tuple[int, int]]
    there: Tensor
    back: Tensor


def pack(blocks: Sequence[TextStates], staying: int | None = None) -> tuple[Tensor, Segments]:
    """Real positions of padded blocks [B, L, H] → [1, N, H], one segment per row.

    Args:
        staying: rows, see Segments.
    """
    lengths = torch.cat([block.mask.sum(1) for block in blocks]).tolist()
    packed = torch.cat([take(*block) for block in blocks])
    return packed[None], Segments(lengths, packed.device, staying)


def leave_before(layers: Iterable[nn.Module]) -> None:
    """Makes the segments that do not stay leave the pass before these decoder layers: nothing reads them there."""
    for layer in layers:
        layer.register_forward_pre_hook(_leave, with_kwargs=True)


def _leave(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    segments: Segments | None = kwargs.get("segments")
    if segments is None or segments.staying is None:
        return None
    count = sum(segments.upper.lengths)
    changes = {
        "segments": segments.upper,
        "position_ids": kwargs["position_ids"][:, :count],
        "position_embeddings": tuple(x[:, :count] for x in kwargs["position_embeddings"]),
    }
    return (args[0][:, :count], *args[1:]), kwargs | changes


def take(padded: Tensor, mask: Tensor) -> Tensor:
    """padded [B, L, …] at the real positions of mask [B, L] → [n, …]."""
    return padded.flatten(0, 1).index_select(0, mask.flatten().nonzero().squeeze(1))


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """values [n, …] → [B, L, …]: the inverse of `take`, zero elsewhere."""
    padded = values.new_zeros(mask.numel(), *values.shape[1:])
    return padded.index_copy(0, mask.flatten().nonzero().squeeze(1), values).unflatten(0, mask.shape)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment; without segments (decoding) transformers' own sdpa.

    Args:
        module: the attention layer.
        query: [1, heads, N, D].
        key, value: [1, key heads, N, D].
        segments: of the packed sequence.

    Returns:
        [1, N, heads, D].

    Raises:
        UserError: a segment is longer than the model's attention window.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = kwargs.get("sliding_window")
    if window is not None and segments.longest > window:
        raise UserError(
            "text.pretrained",
            f"this model looks {window} positions back, a clip takes {segments.longest}",
            "Lower audio.max_seconds or text.max_tokens, or use a model without a sliding window.",
        )
    flat = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, heads, D]
    kernel = varlen_kernel(query, dropout)
    if kernel is not None:
        return kernel(*flat, segments, dropout, scaling)[None], None
    shapes, there, back = segments.groups
    sizes = [rows * width for rows, width in shapes]
    outputs = []
    for (rows, width), *block in zip(shapes, *(x.index_select(0, there).split(sizes) for x in flat), strict=True):
        q, k, v = (x.unflatten(0, (rows, width)).transpose(1, 2) for x in block)
        output, _ = sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)[None], None


def varlen_kernel(query: Tensor, dropout: float) -> Callable[..., Tensor] | None:
    """A kernel that attends without padding, where device and type have one: flash-attn's, else torch's own."""
    if query.dtype not in (torch.bfloat16, torch.float16) or not query.is_cuda:
        return None
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    return flash_attn() or (torch_varlen() if dropout == 0 else None)


@cache
def flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's kernel (arXiv 2307.08691), if it is installed and can be imported."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: PLC0415  an optional package
    except ImportError:
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout: float, scaling: float | None) -> Tensor:
        offsets, longest = segments.offsets, segments.longest
        return flash_attn_varlen_func(
            q, k, v, offsets, offsets, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=True
        )

    return kernel


@cache
def torch_varlen() -> Callable[..., Tensor] | None:
    """torch's kernel, from 2.11 on (before, it could not be told the scale). It has no dropout."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  absent before torch 2.10
    except ImportError:
        return None
    if not {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout: float, scaling: float | None) -> Tensor:
        offsets, longest = segments.offsets, segments.longest
        shared = q.shape[1] // k.shape[1]  # query heads per key head, which it takes from 2.12 on only
        k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
        causal: Any = (-1, 0)
        output: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=causal)
        return output

    return kernel


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
