"""Convolutions that start as a filterbank: what they hear of pure tones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_train.audio import AudioSettings, build_encoder
from dist_train.filterbank import gabor_filters
from dist_train.recipe import validate
from dist_train.speech_encoders import normalise
from sharding.errors import UserErrors
from tests import tiny

BANDS = 32
CONFIG: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16,
    "conv_dim": [4 * BANDS, 2 * BANDS], "conv_kernel": [256, 4], "conv_stride": [80, 4], "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer", "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 1,
}  # fmt: skip


def heard(tone: torch.Tensor) -> torch.Tensor:
    """Feature frames [T, 2 · BANDS] of a waveform [S]."""
    wavlm = build_encoder(AudioSettings(config=CONFIG, start="filterbank", layer=-1))
    mask = torch.ones(1, len(tone), dtype=torch.bool)
    with torch.no_grad():
        return wavlm.feature_extractor(normalise(tone[None], mask))[0].T


@pytest.mark.parametrize("hertz", [200.0, 600.0, 1700.0, 4000.0])
def test_a_tone_excites_its_own_band_whatever_its_phase_and_loudness(hertz: float) -> None:
    centres = (gabor_filters(BANDS, 4096).unflatten(0, (BANDS, 4))[:, 0]).double()
    peaks = torch.fft.rfft(centres).abs().argmax(1) * 16_000 / 4096
    nearest = (peaks - hertz).abs().argsort()[:3]
    time = torch.arange(8000) / 16_000
    phase, loudness = torch.rand(2)
    frames = heard((0.01 + loudness) * torch.sin(2 * torch.pi * (hertz * time + phase)))
    assert set(frames[:, :BANDS].argmax(1).tolist()) <= set(nearest.tolist())
    other = heard(torch.sin(2 * torch.pi * (hertz * time + phase + 0.25)))
    assert torch.nn.functional.cosine_similarity(frames.mean(0), other.mean(0), dim=0) > 0.99


def test_other_convolutions_are_refused(tmp_path: Any) -> None:
    values = tiny.recipe(tmp_path).model_dump(mode="json")
    values["audio"]["start"] = "filterbank"
    with pytest.raises(UserErrors, match=r"audio\.start"):
        validate(values)
