"""Hearing the clip: WavLM over the waveform, or audio features that are already in the shards."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel

from dist_train.adapters import TuningSettings, apply_tuning
from dist_train.filterbank import start_as_filterbank
from dist_train.pretrained import load_model
from dist_train.quantise import check_quantised, quantise
from dist_train.wavlm import outside_zero_init, use_own_attention
from sharding.errors import UserError

SAMPLE_RATE = 16_000  # Hz, WavLM's


class AudioSettings(TuningSettings):
    """Where audio states come from."""

    input: Literal["waveform", "features"] = Field(
        "waveform", description="`waveform`: WavLM hears KEY.wav. `features`: KEY.audio.npy enters as it is, no WavLM."
    )
    pretrained: str | None = Field(
        None, description="Local folder or hub id of a WavLM model, e.g. microsoft/wavlm-large. Default: none."
    )
    config: dict[str, Any] | None = Field(
        None, description="Fields of transformers.WavLMConfig for a randomly initialised WavLM. Default: none."
    )
    start: Literal["random", "filterbank"] = Field(
        "random",
        description="With `config`: weights the two convolutions start from; `filterbank` (mel-spaced Gabor filters) "
        "spares a small model without pretraining from having to discover the spectrum. The rest is random.",
    )
    layer: int = Field(
        -5, description="Index into WavLM's hidden_states for the audio stream (-5 is 20 of 24 in WavLM-Large)."
    )
    train_feature_encoder: bool = Field(
        False, description="With tuning `full`: train the convolutional front end too. Usual practice: false."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only each WavLM layer's input for the backward pass and compute the rest again: less memory, "
        "a third more time.",
    )
    max_seconds: float = Field(60.0, gt=0, description="Longest clip accepted, in seconds.")


class AudioStates(NamedTuple):
    """stream [B, T, D]: the layer that feeds fusion; last [B, T, D]: the layer the projector reads; mask [B, T]."""

    stream: Tensor
    last: Tensor
    mask: Tensor


def build_wavlm(settings: AudioSettings, dtype: torch.dtype = torch.float32) -> Any:
    """WavLM from a folder, the hub or a configuration, made safe for distributed training.

    Layer drop is off because it would run other modules on other ranks (ZeRO then hangs or mixes gradients),
    spec-augment because its mask embedding is without gradient in most steps.

    Raises:
        UserError: for a model that cannot be loaded, or whose output depends on padding.
    """
    safe: dict[str, Any] = {"layerdrop": 0.0, "apply_spec_augment": False, "add_adapter": False}
    if settings.pretrained is None:
        model: Any = WavLMModel(WavLMConfig(**{**(settings.config or {}), **safe}))
        if settings.start == "filterbank":
            start_as_filterbank(model)
    else:
        model = load_model(WavLMModel, "audio.pretrained", settings.pretrained, dtype=dtype, **safe)
    use_own_attention(model)
    if model.config.feat_extract_norm != "layer":
        raise UserError(
            "audio",
            "this WavLM normalises its features over time (feat_extract_norm='group'), "
            "so a clip would depend on its padding",
            "Use WavLM-Large or a configuration with feat_extract_norm: layer.",
        )
    layers = model.config.num_hidden_layers
    if not -layers - 1 <= settings.layer <= layers:
        raise UserError(
            "audio.layer",
            f"{settings.layer} is outside hidden_states of a WavLM with {layers} layers",
            f"Write a number from {-layers - 1} to {layers}.",
        )
    quantise(model, settings.quantisation, settings.int8_threshold, dtype, skip={"gru_rel_pos_linear"})
    check_quantised(model, settings.quantisation, where="audio")
    return model


class AudioEncoder(nn.Module):
    """Waveform [B, S] → WavLM states at about 50 frames/s (METHOD: hidden state `layer` for fusion, last for the
    projector).

    The last state is the encoder's output, after its final norm; transformers' `hidden_states[-1]` is taken before it
    where `do_stable_layer_norm` is set.

    Args:
        settings: what to load and what to train.
        minimum_frames: frames of the shortest clip; shorter ones are padded with silence to it.
        needs_last: whether something reads the last layer. If not, the layers above `layer` have no gradient
            and are cut off.
    """

    @outside_zero_init()
    def __init__(
        self,
        settings: AudioSettings,
        *,
        minimum_frames: int,
        needs_last: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.wavlm = build_wavlm(settings, dtype)
        config = self.wavlm.config
        self.layer = settings.layer % (config.num_hidden_layers + 1)
        self.stream_is_last = not needs_last or self.layer == config.num_hidden_layers
        if not needs_last:
            self.wavlm.encoder.layers = self.wavlm.encoder.layers[: self.layer]
            if config.do_stable_layer_norm and self.layer < config.num_hidden_layers:
                self.wavlm.encoder.layer_norm = nn.Identity()  # it belongs to the last layer's output
        if settings.activation_checkpointing:
            # Reentrant checkpointing fails under ZeRO, and gives no gradient above frozen layers.
            old_name = "gradient_checkpointing_enable"
            getattr(self.wavlm, "activation_checkpointing_enable", getattr(self.wavlm, old_name))(
                {"use_reentrant": False}
            )
        self.width: int = config.hidden_size
        self.trained = settings.tuning != "frozen"
        apply_tuning(self.wavlm, settings, where="audio")
        if hasattr(self.wavlm, "masked_spec_embed"):
            self.wavlm.masked_spec_embed.requires_grad_(False)  # used by spec-augment only
        if settings.tuning != "full" or not settings.train_feature_encoder:
            # Not even for LoRA above it: transformers would then differentiate it down to the waveform.
            self.wavlm.feature_extractor._freeze_parameters()
        self.minimum_samples = shortest_waveform(config, frames=minimum_frames)

    def train(self, mode: bool = True) -> AudioEncoder:
        """Sets training mode; a frozen WavLM stays in evaluation mode (no dropout)."""
        super().train(mode and self.trained)
        return self

    def forward(self, waveform: Tensor, mask: Tensor) -> AudioStates:
        """waveform [B, S] in [-1, 1], mask [B, S] (True = sound) → AudioStates."""
        waveform = normalise(waveform, mask)
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            output = self.wavlm(
                waveform.to(next(self.wavlm.parameters()).dtype),
                attention_mask=mask.long(),
                output_hidden_states=not self.stream_is_last,
            )
        last = output.last_hidden_state
        stream = last if self.stream_is_last else output.hidden_states[self.layer]
        frames = self.wavlm._get_feat_extract_output_lengths(mask.sum(1))
        frame_mask = torch.arange(last.shape[1], device=frames.device) < frames[:, None]
        return AudioStates(stream, last, frame_mask)


class AudioFeatures(nn.Module):
    """The same interface for features [B, T, D] that are already in the shards."""

    def __init__(self, width: int, *, minimum_frames: int) -> None:
        super().__init__()
        self.width = width
        self.minimum_samples = minimum_frames

    def forward(self, features: Tensor, mask: Tensor) -> AudioStates:
        """features [B, T, D], mask [B, T] → AudioStates."""
        return AudioStates(features, features, mask)


def normalise(waveform: Tensor, mask: Tensor) -> Tensor:
    """Zero mean, unit variance per clip over its own samples, as WavLM-Large's feature extractor does; padding
    becomes 0.
    """
    count = mask.sum(1, keepdim=True)
    mean = (waveform * mask).sum(1, keepdim=True) / count
    centred = (waveform - mean) * mask
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / torch.sqrt(variance + 1e-7)


def shortest_waveform(config: WavLMConfig, *, frames: int) -> int:
    """Number of samples that give `frames` frames: shorter clips are padded with silence to it."""
    length = frames
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    return length
