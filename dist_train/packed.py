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
    changes: dict[str, Any] = {"segments": segments.upper}
    if kwargs.get("position_ids") is not None:
        changes["position_ids"] = kwargs["position_ids"][:, :count]
    if kwargs.get("position_embeddings") is not None:
        changes["position_embeddings"] = tuple(x[:, :count] for x in kwargs["position_embeddings"])
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment; without segments (decoding) attention under transformers' mask.

    Args:
        module: the attention layer.
        query: [1, heads, N, D].
        key, value: [1, key heads, N, D].
        segments: of the packed sequence.
        sliding_window: positions that a query sees, its own among them; None: all before it.
        softcap: c in c · tanh(score / c), Gemma 2's (arXiv 2408.00118 §2); None: scores as they are.

    Returns:
        [1, N, heads, D].
    """
    if segments is None:
        if softcap is not None:
            return capped(query, key, value, attention_mask, dropout, scaling, softcap), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = None if sliding_window is None or sliding_window >= segments.longest else sliding_window
    flat = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, heads, D]
    kernel = varlen_kernel(query, dropout, softcap)
    if kernel is not None:
        return kernel(*flat, segments, dropout, scaling, window)[None], None
    shapes, there, back = segments.groups
    sizes = [rows * width for rows, width in shapes]
    outputs = []
    for (rows, width), *block in zip(shapes, *(x.index_select(0, there).split(sizes) for x in flat), strict=True):
        q, k, v = (x.unflatten(0, (rows, width)).transpose(1, 2) for x in block)
        mask = None if window is None or width <= window else seen(width, window, query.device)
        if softcap is not None:
            output = capped(q, k, v, mask, dropout, scaling, softcap)
        else:
            output, _ = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=True)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)[None], None


def seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [1, 1, length, length]: which keys (columns) a query sees, the last `window` up to its own."""
    positions = torch.arange(length, device=device)
    back = positions[:, None] - positions
    return ((back >= 0) & (back < (window or length)))[None, None]


def capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention with soft-capped scores, which torch's fused kernels lack: it keeps L × L weights per head.

    Args:
        query: [B, heads, L, D].
        key, value: [B, key heads, S, D].
        mask: bool [B, 1, L, S], False for keys that are not seen; None: causal.

    Returns:
        [B, L, heads, D].
    """
    shared, (length, width) = query.shape[1] // key.shape[1], (query.shape[2], query.shape[3])
    key, value = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
    if mask is None and length > 1:
        mask = seen(length, None, query.device)
    scores = torch.matmul(query, key.transpose(2, 3)) * (width**-0.5 if scaling is None else scaling)
    scores = torch.tanh(scores.to(torch.promote_types(scores.dtype, torch.float32)) / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.softmax(-1).to(query.dtype), dropout)
    return torch.matmul(weights, value).transpose(1, 2)


def varlen_kernel(query: Tensor, dropout: float, softcap: float | None = None) -> Callable[..., Tensor] | None:
    """A kernel that attends without padding, where device and type have one: flash-attn's, else torch's own. None of
    them is used for soft-capped scores.
    """
    if softcap is not None:
        return None
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

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        dropout: float,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        offsets, longest = segments.offsets, segments.longest
        rest: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True}
        if window is not None:
            rest["window_size"] = (window - 1, 0)
        return flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, **rest)

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

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        dropout: float,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        offsets, longest = segments.offsets, segments.longest
        shared = q.shape[1] // k.shape[1]  # query heads per key head, which it takes from 2.12 on only
        k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
        causal: Any = (-1 if window is None else window - 1, 0)
        output: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=causal)
        return output

    return kernel


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
