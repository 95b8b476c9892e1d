"""What the missing flow has to do without: which modality of which clip, and the inputs that are left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_train.names import MODALITIES
from dist_train.packed import TextStates

AUDIO, TEXT, VISION = range(3)
Missing = Literal["text", "audio", "vision", "random"]


class Streams(NamedTuple):
    """The three inputs of one flow: states [B, T, width] and mask [B, T] each. What a clip lacks is one zero step."""

    audio: TextStates
    text: TextStates
    vision: TextStates


def lacking_modalities(missing: Missing) -> tuple[str, ...]:
    """What the missing flow may lack under this setting."""
    return MODALITIES if missing == "random" else (missing,)


def present_of(batch: Any) -> Tensor:
    """[B, 3] bool: what each clip of a batch has."""
    return torch.stack([batch[f"{name}_present"].bool() for name in MODALITIES], 1)


def draw_dropped(missing: Missing, present: Tensor, index: Sequence[int], seed: int, epoch: int) -> Tensor:
    """[B, 3] bool: what the missing flow does without, one modality per clip.

    `random` chooses among what the clip has, all alike, a function of seed, epoch and clip. A clip that has but one
    modality keeps it: one that it lacks is taken instead.

    Args:
        present: bool [B, 3], what the clips have.
        index: position of each clip in its split.
    """
    if missing != "random":
        columns = [MODALITIES.index(missing)] * len(index)
    else:
        columns = []
        for clip, has in zip(index, present.tolist(), strict=True):
            candidates = np.flatnonzero(has) if sum(has) > 1 else np.flatnonzero(~np.array(has))
            columns.append(int(np.random.default_rng([seed, epoch, clip]).choice(candidates)))
    dropped = torch.zeros(len(index), 3, dtype=torch.bool)
    dropped[torch.arange(len(index)), columns] = True
    return dropped


def drop(batch: Any, missing: Missing, seed: int, epoch: int) -> None:
    """Says in a batch on the CPU what its missing flow does without in this epoch (`Batch.dropped`)."""
    batch["dropped"] = draw_dropped(missing, present_of(batch), batch["index"].tolist(), seed, epoch)


def lacked(dropped: Tensor) -> Tensor:
    """[B] number of the modality that is imagined and distilled: the first one dropped; of none, the text."""
    return torch.where(dropped.any(1), dropped.int().argmax(1), TEXT)


def has_teacher(batch: Any) -> Tensor:
    """[B] bool: whether the clip has what the missing flow does without, so that the complete flow can teach it."""
    return present_of(batch).gather(1, lacked(batch["dropped"])[:, None])[:, 0]


def without(complete: Streams, simulated: TextStates, dropped: Tensor) -> Streams:
    """The streams of the missing flow: zero steps instead of what is dropped, imagined text instead of the real.

    The real text is not even looked at where every clip does without.

    Args:
        simulated: the imagined text, [B, L, width].
        dropped: bool [B, 3].
    """
    audio, text, vision = dropped.unbind(1)
    imagined = keep_where(simulated, ~audio)  # nothing can be imagined from audio that is not there
    if not text.all():
        real, mask = complete.text
        imagined = TextStates(
            torch.cat([imagined.states, real], 1),
            torch.cat([imagined.mask & text[:, None], mask & ~text[:, None]], 1),
        )
    return Streams(keep_where(complete.audio, ~audio), imagined, keep_where(complete.vision, ~vision))


def absent(stream: TextStates) -> TextStates:
    """In the stream's place: one zero step of each clip."""
    return TextStates(torch.zeros_like(stream.states[:, :1]), torch.ones_like(stream.mask[:, :1]))


def keep_where(stream: TextStates, kept: Tensor) -> TextStates:
    """The stream, itself if all clips keep it."""
    return stream if kept.all() else present_or_zero(*stream, kept)


def present_or_zero(states: Tensor, mask: Tensor, present: Tensor) -> TextStates:
    """states [B, T, D], mask [B, T]; where present [B] is False: one zero position, still connected to the graph."""
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return TextStates(states * present[:, None, None].to(states.dtype), torch.where(present[:, None], mask, first))
