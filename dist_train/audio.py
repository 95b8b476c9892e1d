"""Hearing the clip: a speech encoder over the waveform, or audio features that are already in the shards."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_train.adapters import TuningSettings, apply_tuning
from dist_train.cmpt import EncoderTokens
from dist_train.filterbank import start_as_filterbank
from dist_train.quantise import check_quantised, quantise
from dist_train.speech_encoders import (
    cut,
    freeze_front,
    hear,
    load_encoder,
    make_encoder,
    normalises,
    shortest_waveform,
    too_long,
)
from dist_train.wavlm import outside_zero_init
from sharding.errors import UserError

SAMPLE_RATE = 16_000  # Hz, of all encoders


class AudioSettings(TuningSettings):
    """Where audio states come from."""

    input: Literal["waveform", "features"] = Field(
        "waveform",
        description="`waveform`: a speech encoder hears KEY.wav. `features`: KEY.audio.npy enters as it is.",
    )
    pretrained: str | None = Field(
        None,
        description="Local folder or hub id of a WavLM, HuBERT, wav2vec 2.0 or Whisper model, e.g. "
        "microsoft/wavlm-large; of Whisper the encoder is taken. Default: none.",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Fields of the configuration of a randomly initialised encoder: `model_type` (wavlm, hubert, "
        "wav2vec2 or whisper; default wavlm) and those that it has. Default: none.",
    )
    start: Literal["random", "filterbank"] = Field(
        "random",
        description="With `config`: weights the two convolutions start from; `filterbank` (mel-spaced Gabor filters) "
        "spares a small model without pretraining from having to discover the spectrum. The rest is random.",
    )
    layer: int = Field(
        -5, description="Index into the encoder's hidden_states for the audio stream (-5 is 20 of 24 in WavLM-Large)."
    )
    train_feature_encoder: bool = Field(
        False, description="With tuning `full`: train the convolutional front end too. Usual practice: false."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only each encoder layer's input for the backward pass and compute the rest again: less "
        "memory, a third more time.",
    )
    max_seconds: float = Field(60.0, gt=0, description="Longest clip accepted, in seconds; Whisper hears 30.")


class AudioStates(NamedTuple):
    """stream [B, T, D]: the layer that feeds fusion; last [B, T, D]: the layer the projector reads; mask [B, T]."""

    stream: Tensor
    last: Tensor
    mask: Tensor
    proxies: Tensor | None = None
    """[B, K, D] states of CMPT's tokens in the layer that feeds fusion."""


def build_encoder(settings: AudioSettings, dtype: torch.dtype = torch.float32) -> Any:
    """A speech encoder from a folder, the hub or a configuration, made safe for distributed training.

    Raises:
        UserError: for a model that cannot be loaded, or cannot do what the settings ask.
    """
    if settings.pretrained is None:
        model: Any = make_encoder(settings.config or {})
        if settings.start == "filterbank":
            start_as_filterbank(model)
    else:
        model = load_encoder(settings.pretrained, dtype)
    layers = model.config.num_hidden_layers
    if not -layers - 1 <= settings.layer <= layers:
        raise UserError(
            "audio.layer",
            f"{settings.layer} is outside hidden_states of a {model.config.model_type} with {layers} layers",
            f"Write a number from {-layers - 1} to {layers}.",
        )
    for problem in too_long(model.config, settings.max_seconds):
        raise problem
    quantise(model, settings.quantisation, settings.int8_threshold, dtype, skip={"gru_rel_pos_linear"})
    check_quantised(model, settings.quantisation, where="audio")
    return model


class AudioEncoder(nn.Module):
    """Waveform [B, S] → states of a speech encoder at about 50 frames/s (METHOD: hidden state `layer` for fusion, last
    for the projector).

    The last state is the encoder's output, after its final norm; transformers' `hidden_states[-1]` of WavLM, HuBERT
    and wav2vec 2.0 is taken before it where `do_stable_layer_norm` is set. Parameters are named after the encoder:
    wavlm.…, hubert.…, wav2vec2.…, whisper.….

    Args:
        settings: what to load and what to train.
        minimum_frames: frames of the shortest clip; shorter ones are padded with silence to it.
        needs_last: whether something reads the last layer. If not, the layers above `layer` have no gradient
            and are cut off.
        tokens: of CMPT, in front of the frames.
    """

    @outside_zero_init()
    def __init__(
        self,
        settings: AudioSettings,
        *,
        minimum_frames: int,
        needs_last: bool,
        dtype: torch.dtype = torch.float32,
        tokens: int = 0,
    ) -> None:
        super().__init__()
        model = build_encoder(settings, dtype)
        config = model.config
        self.kind: str = config.model_type
        self.add_module(self.kind, model)
        self.layer = settings.layer % (config.num_hidden_layers + 1)
        self.stream_is_last = not needs_last or self.layer == config.num_hidden_layers
        if not needs_last:
            cut(model, self.layer)
        if settings.activation_checkpointing:
            # Reentrant checkpointing fails under ZeRO, and gives no gradient above frozen layers.
            old_name = "gradient_checkpointing_enable"
            getattr(model, "activation_checkpointing_enable", getattr(model, old_name))({"use_reentrant": False})
        self.width: int = config.hidden_size
        self.normal = normalises(settings.pretrained)
        self.trained = settings.tuning != "frozen"
        apply_tuning(model, settings, where="audio")
        freeze_front(model, convolutions=settings.tuning != "full" or not settings.train_feature_encoder)
        self.minimum_samples = shortest_waveform(config, frames=minimum_frames)
        self.tokens, self.inside = None, None
        if tokens and self.kind == "whisper":
            raise UserError("audio", "is a Whisper, which takes no proxy tokens", "Use WavLM, HuBERT or wav2vec 2.0.")
        if tokens:
            self.tokens = nn.Parameter(nn.init.normal_(torch.empty(tokens, self.width), std=0.02))
            self.inside = EncoderTokens(model.encoder, tokens)

    @property
    def model(self) -> Any:
        """The encoder itself."""
        return self.get_submodule(self.kind)

    def train(self, mode: bool = True) -> AudioEncoder:
        """Sets training mode; a frozen encoder stays in evaluation mode (no dropout)."""
        super().train(mode and self.trained)
        return self

    def forward(self, waveform: Tensor, mask: Tensor) -> AudioStates:
        """waveform [B, S] in [-1, 1], mask [B, S] (True = sound) → AudioStates."""
        learns = self.trained or self.tokens is not None
        if self.inside is not None:
            self.inside.tokens = self.tokens
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            output, frames = hear(self.model, waveform, mask, normal=self.normal, hidden_states=not self.stream_is_last)
        last = output.last_hidden_state
        stream = last if self.stream_is_last else output.hidden_states[self.layer]
        proxies = None
        if self.inside is not None:
            self.inside.tokens = None
            proxies = stream[:, : self.inside.count]
            stream, last = stream[:, self.inside.count :], last[:, self.inside.count :]
        frame_mask = torch.arange(last.shape[1], device=frames.device) < frames[:, None]
        return AudioStates(stream, last, frame_mask, proxies)


class AudioFeatures(nn.Module):
    """The same interface for features [B, T, D] that are already in the shards."""

    def __init__(self, width: int, *, minimum_frames: int) -> None:
        super().__init__()
        self.width = width
        self.minimum_samples = minimum_frames

    def forward(self, features: Tensor, mask: Tensor) -> AudioStates:
        """features [B, T, D], mask [B, T] → AudioStates."""
        return AudioStates(features, features, mask)
