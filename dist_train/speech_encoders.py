"""Speech encoders of transformers that can hear the clips: WavLM, HuBERT, wav2vec 2.0, and Whisper's encoder.

All give about 50 frames/s and hidden states counted alike; what differs between them is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FeatureExtractionMixin, HubertModel, PretrainedConfig, Wav2Vec2Model, WavLMModel, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from dist_train import whisper
from dist_train.pretrained import LOAD_ERRORS, config_problems, load_config, load_model, make_config
from dist_train.wavlm import use_own_attention
from sharding.errors import UserError
from sharding.shards import SAMPLE_RATE

WAVLM = "wavlm"  # `model_type` where audio.config names none
KINDS: dict[str, Any] = {"wavlm": WavLMModel, "hubert": HubertModel, "wav2vec2": Wav2Vec2Model, "whisper": WhisperModel}
# Layer drop would run other modules on other ranks (ZeRO then hangs or mixes gradients); the mask embedding of
# spec-augment is without gradient in most steps.
SAFE: dict[str, Any] = {"apply_spec_augment": False}
CONVOLUTIONAL = {**SAFE, "layerdrop": 0.0}
SAFE_OF: dict[str, dict[str, Any]] = {
    "wavlm": {**CONVOLUTIONAL, "add_adapter": False},
    "hubert": CONVOLUTIONAL,
    "wav2vec2": {**CONVOLUTIONAL, "add_adapter": False},
    "whisper": {**SAFE, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
}


class ClipNorm(nn.GroupNorm):
    """The norm over time of base-size models (feat_extract_norm: group), over each clip's own frames.

    Args:
        frames: of each clip of the next batch at this place.
    """

    frames: list[int]

    def forward(self, states: Tensor) -> Tensor:
        """[B, C, T] → the same shape, zero behind a clip's frames."""
        width = states.shape[2]
        rows = [super(ClipNorm, self).forward(row[None, :, :count]) for row, count in zip(states, self.frames)]  # noqa: B905
        return torch.cat([nn.functional.pad(row, (0, width - row.shape[2])) for row in rows])


def make_encoder(config: dict[str, Any]) -> nn.Module:
    """A randomly initialised encoder with these fields, made safe for distributed training."""
    kind = config.get("model_type", WAVLM)
    made = make_config({**config, **SAFE_OF[kind]}, WAVLM)
    model: nn.Module = whisper.Whisper(made) if kind == "whisper" else KINDS[kind](made)  # type: ignore[arg-type]
    return prepared(model)


def load_encoder(name: str, dtype: torch.dtype) -> nn.Module:
    """An encoder from a folder or the hub, made safe for distributed training; of Whisper the encoder alone.

    Raises:
        UserError: it cannot be loaded, or is of a kind that is not known here.
    """
    kind = load_config("audio.pretrained", name).model_type
    if kind not in KINDS:
        raise UserError(
            "audio.pretrained", f"{name!r} is a {kind} model", f"Use a speech encoder of these: {', '.join(KINDS)}."
        )
    model: Any = load_model(KINDS[kind], "audio.pretrained", name, dtype=dtype, **SAFE_OF[kind])
    return prepared(whisper.prepare(model.get_encoder()) if kind == "whisper" else model)


def prepared(model: Any) -> nn.Module:
    """Gives the encoder attention that trains, and norms that padding does not reach, in place.

    Raises:
        UserError: its states would hang on the other clips of a batch.
    """
    if getattr(model.config, "conv_pos_batch_norm", False):
        raise UserError(
            "audio",
            "this model normalises its positions over the batch (conv_pos_batch_norm)",
            "Use one that does not.",
        )
    use_own_attention(model)
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ClipNorm
    return model


def config_is_wrong(config: dict[str, Any]) -> Iterator[UserError]:
    """What is wrong with the fields of `audio.config`."""

    def build(made: PretrainedConfig) -> nn.Module:
        kind: Any = WhisperEncoder if made.model_type == "whisper" else KINDS[made.model_type]
        model: nn.Module = kind(made)
        return model

    def second(made: Any) -> dict[str, Tensor]:
        if made.model_type == "whisper":
            return {"input_features": torch.zeros(1, made.num_mel_bins, whisper.POOLED * made.max_source_positions)}
        return {"input_values": torch.zeros(1, SAMPLE_RATE)}

    yield from config_problems(config, "audio.config", KINDS, WAVLM, build, second)


def too_long(config: Any, max_seconds: float) -> Iterator[UserError]:
    """A limit on clips above what the encoder can hear."""
    if config.model_type == "whisper" and max_seconds > whisper.longest_clip(config):
        yield UserError(
            "audio.max_seconds",
            f"is {max_seconds:g}, but this Whisper has positions for {whisper.longest_clip(config):g} s",
            f"Write audio.max_seconds: {whisper.longest_clip(config):g}; longer clips then stop the run or are set "
            "aside (data.on_bad_sample).",
        )


def normalises(name: str | None) -> bool:
    """Whether a pretrained encoder hears waveforms of zero mean and unit variance, as its preprocessor says."""
    try:
        said, _ = FeatureExtractionMixin.get_feature_extractor_dict(name) if name is not None else ({}, {})
    except LOAD_ERRORS:
        return True
    return bool(said.get("do_normalize", True))


def layers_of(model: Any) -> tuple[Any, nn.ModuleList]:
    """What holds the encoder's layers and final norm, and the layers."""
    holder = model if isinstance(model, WhisperEncoder) else model.encoder
    return holder, holder.layers


def cut(model: Any, layer: int) -> None:
    """Cuts off the layers above hidden state `layer`, and the norm that belongs to the last layer's output."""
    holder, layers = layers_of(model)
    top = layer == len(layers)
    holder.layers = layers[:layer]
    if not top and (isinstance(model, WhisperEncoder) or model.config.do_stable_layer_norm):
        holder.layer_norm = nn.Identity()


def freeze_front(model: Any, *, convolutions: bool) -> None:
    """Freezes what is never trained (fixed positions, the mask embedding), and the convolutions if asked."""
    if isinstance(model, WhisperEncoder):
        model.embed_positions.requires_grad_(False)
        if convolutions:
            model.conv1.requires_grad_(False)
            model.conv2.requires_grad_(False)
        return
    if hasattr(model, "masked_spec_embed"):
        model.masked_spec_embed.requires_grad_(False)
    if convolutions:
        # Not even for LoRA above it: transformers would then differentiate it down to the waveform.
        model.feature_extractor._freeze_parameters()


def hear(model: Any, waveform: Tensor, mask: Tensor, *, normal: bool, hidden_states: bool) -> tuple[Any, Tensor]:
    """Runs the encoder.

    Args:
        waveform: [B, S] in [-1, 1]; mask: [B, S], True = sound.
        normal: whether the encoder wants zero mean and unit variance.
        hidden_states: whether all of them are wanted.

    Returns:
        The output of transformers' kind, and the frames of each clip [B].
    """
    samples = mask.sum(1)
    if isinstance(model, WhisperEncoder):
        output: Any = model(waveform, mask, output_hidden_states=hidden_states)
        return output, whisper.frame_counts(samples)
    for layer, norm in clip_norms(model):
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        norm.frames = ((samples - kernel) // stride + 1).tolist()
    waveform = normalise(waveform, mask) if normal else waveform * mask
    output = model(
        waveform.to(next(model.parameters()).dtype), attention_mask=mask.long(), output_hidden_states=hidden_states
    )
    return output, model._get_feat_extract_output_lengths(samples)


def clip_norms(model: Any) -> Iterable[tuple[Any, ClipNorm]]:
    """Convolutions with a norm over time, and that norm: the first one of a base-size model."""
    first = model.feature_extractor.conv_layers[0]
    norm = getattr(first, "layer_norm", None)
    return [(first, norm)] if isinstance(norm, ClipNorm) else []


def normalise(waveform: Tensor, mask: Tensor) -> Tensor:
    """Zero mean, unit variance per clip over its own samples, as WavLM-Large's feature extractor does; padding
    becomes 0.
    """
    count = mask.sum(1, keepdim=True)
    mean = (waveform * mask).sum(1, keepdim=True) / count
    centred = (waveform - mean) * mask
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / torch.sqrt(variance + 1e-7)


def shortest_waveform(config: Any, *, frames: int) -> int:
    """Number of samples that give `frames` frames: shorter clips are padded with silence to it."""
    if config.model_type == "whisper":
        return whisper.shortest(frames)
    length = frames
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    return length
