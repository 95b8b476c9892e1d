"""A start for small encoders without pretraining: convolutions that hear pitch and formants from the first step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dist_train.pretrained import make_config

PHASES = 4  # 0°, 90°, 180°, 270°: rectified and added they follow the amplitude whatever the phase
LOWEST, HIGHEST = 60.0, 7600.0  # Hz, centres of the outermost bands


def fits_filterbank(config: dict[str, Any]) -> bool:
    """Whether an encoder of these fields has convolutions [4·n, 2·n] for n bands, their norms over channels."""
    made: Any = make_config(config, "wavlm")
    dims = list(getattr(made, "conv_dim", ()))
    return (
        getattr(made, "feat_extract_norm", None) == "layer"
        and len(dims) == 2
        and dims[0] == 2 * dims[1]
        and dims[0] % PHASES == 0
    )


@torch.no_grad()
def start_as_filterbank(model: Any) -> None:
    """Sets the two convolutions of a randomly initialised encoder to a mel-spaced filterbank, in place.

    First convolution: windowed sinusoids (Gabor filters) at n centres on the mel scale in four phases, higher bands
    amplified as speech falls off towards them. The model then normalises over channels and rectifies (GELU). Second
    convolution: mean over phases and time, less the mean over bands, with both signs because GELU follows again.
    The idea is that of SincNet (arXiv 1808.00158) and LEAF (arXiv 2101.08596).
    """
    layers: Any = model.feature_extractor.conv_layers
    first, second = layers[0].conv, layers[1].conv
    bands = first.out_channels // PHASES
    first.weight.copy_(gabor_filters(bands, first.kernel_size[0])[:, None])
    contrast = torch.eye(bands) - 1 / bands
    pooled = contrast.repeat_interleave(PHASES, 1) / second.kernel_size[0]
    second.weight.copy_(torch.cat([pooled, -pooled])[..., None].expand_as(second.weight))


def gabor_filters(bands: int, length: int, sample_rate: int = 16_000) -> Tensor:
    """Windowed sinusoids [bands · PHASES, length], band-major."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (LOWEST, HIGHEST))
    centres = 700 * (10 ** (torch.linspace(low, high, bands) / 2595) - 1)
    time = (torch.arange(length) - (length - 1) / 2) / sample_rate
    shift = torch.arange(PHASES) * 2 * math.pi / PHASES
    waves = torch.cos(2 * math.pi * centres[:, None, None] * time + shift[:, None])
    gain = centres.clamp(min=300) / 300
    return (gain[:, None, None] * waves * torch.hann_window(length, periodic=False)).flatten(0, 1) / length
