"""Whisper's encoder (arXiv 2212.04356) from the waveform on, without the 30 s to which transformers' pads each clip.

A clip counts as long as it is: its log-mel frames are those of Whisper's feature extractor, its positions the first
ones, and attention does not see what is behind it (SLAM-LLM hears variable lengths in the same way, without the mask).
A clip of 30 s has the stock model's states; of a shorter one the stock model also attends to the silence it adds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperConfig
from transformers.audio_utils import mel_filter_bank
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sharding.shards import SAMPLE_RATE

WINDOW, HOP = 400, 160  # samples: 25 ms every 10 ms
POOLED = 2  # log-mel frames per frame: the second convolution's stride
REACH = 2  # log-mel frames behind a clip that its last frame hears through the convolutions
FLOOR, RANGE = 1e-10, 8.0  # least power, and decades below the clip's loudest value


class Whisper(WhisperEncoder):
    """transformers' encoder, called with waveforms; parameters keep their names, order and values."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        prepare(self)

    def forward(
        self, waveform: Tensor, attention_mask: Tensor, *, output_hidden_states: bool = False
    ) -> BaseModelOutput:
        """waveform [B, S] in [-1, 1], mask [B, S] → states at 50 frames/s.

        Returns:
            last_hidden_state: after the final norm. hidden_states: before each layer, and the last state.
        """
        lengths = attention_mask.sum(1)
        features = log_mel(waveform, lengths, self.window, self.filters, longest=POOLED * self.max_source_positions)
        frames = frame_counts(lengths)
        count = int(frames.max())
        x = F.gelu(self.conv1(features.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x))[..., :count].transpose(1, 2)
        places = torch.arange(count, device=x.device)
        x = F.dropout(x + self.embed_positions(places), p=self.dropout, training=self.training)
        heard = (places < frames[:, None])[:, None, None]
        states: list[Tensor] = []
        for layer in self.layers:
            states.append(x)
            x = layer(x, heard)
        x = self.layer_norm(x)
        return BaseModelOutput(last_hidden_state=x, hidden_states=(*states, x) if output_hidden_states else None)


def prepare(encoder: WhisperEncoder) -> Whisper:
    """Makes transformers' encoder one of ours, in place."""
    ours: Any = encoder
    ours.__class__ = Whisper
    bank = mel_filter_bank(
        num_frequency_bins=1 + WINDOW // 2,
        num_mel_filters=encoder.num_mel_bins,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    device = encoder.layer_norm.weight.device
    ours.register_buffer("filters", torch.tensor(bank, dtype=torch.float32, device=device).T, persistent=False)
    ours.register_buffer("window", torch.hann_window(WINDOW, device=device), persistent=False)
    return ours


def longest_clip(config: WhisperConfig) -> float:
    """Seconds for which the encoder has positions."""
    return config.max_source_positions * POOLED * HOP / SAMPLE_RATE


def frame_counts(samples: Tensor) -> Tensor:
    """Frames that a clip of so many samples has."""
    return (samples + POOLED * HOP - 1) // (POOLED * HOP)


def shortest(frames: int) -> int:
    """Samples of the shortest clip with so many frames; at least a window, of which half is mirrored in front."""
    return max((frames - 1) * POOLED * HOP + 1, WINDOW)


@torch.no_grad()
def log_mel(waveform: Tensor, lengths: Tensor, window: Tensor, filters: Tensor, *, longest: int) -> Tensor:
    """Log-mel frames of WhisperFeatureExtractor, of each clip as if alone in front of silence.

    Args:
        waveform: [B, S]; what is behind a clip's end counts as silence.
        lengths: [B] samples of each clip.
        window: [400]; filters: [mels, 201]; both fp32.
        longest: most frames.

    Returns:
        [B, mels, T] fp32, T frames of the longest clip and those behind it that its last frame hears.
    """
    frames = min((int(lengths.max()) + HOP - 1) // HOP + REACH, longest)
    sound = waveform.to(torch.float32)
    sound = sound.where(torch.arange(sound.shape[1], device=sound.device) < lengths[:, None], 0)
    # The feature extractor mirrors what is before the clip and behind the 30 s; between them there is silence.
    end = min(longest, frames + REACH) * HOP
    sound = F.pad(sound, (0, max(0, end - sound.shape[1])))[:, :end]
    sound = F.pad(sound[:, None], (WINDOW // 2, WINDOW // 2), mode="reflect")[:, 0, : (frames - 1) * HOP + WINDOW]
    spectrum = torch.stft(sound, WINDOW, HOP, window=window.float(), center=False, return_complex=True)
    power = filters.float() @ spectrum.abs().square()
    decades = power.clamp(min=FLOOR).log10()
    decades = torch.maximum(decades, decades.amax((1, 2), keepdim=True) - RANGE)
    return (decades + 4) / 4
