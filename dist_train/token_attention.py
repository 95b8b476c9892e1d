"""How CMPT's tokens attend over the audio of a clip: weights of the model itself, kept for the clips a report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from dist_train import wavlm
from dist_train.audio import SAMPLE_RATE, AudioEncoder
from dist_train.batch import Collator
from dist_train.build import to_device
from dist_train.missing import AUDIO
from dist_train.model import DoubleFlow
from dist_train.names import MODALITIES
from dist_train.promma import Attention
from dist_train.speech_encoders import layers_of
from sharding.collectives import device
from sharding.stream import ShardedSplit

CLIP = "clip/"  # in front of a clip's key in the file


def heard_targets(model: DoubleFlow) -> list[int]:
    """Numbers of the modalities that a token in the audio stands for, audio itself left out; none without CMPT."""
    cmpt = model.fusion.cmpt
    hears = cmpt is not None and (cmpt.hear is not None or MODALITIES[AUDIO] in cmpt.branches)
    return [target for target in cmpt.targets if target != AUDIO] if cmpt is not None and hears else []


@torch.no_grad()
def token_attention(model: DoubleFlow, batch: Any) -> Tensor:
    """Weights with which each of K tokens attends to [tokens; frames] in each layer that has them: [layers, K, K + T],
    mean over heads. Each row sums to 1.

    Args:
        model: in evaluation mode, with tokens in its audio.
        batch: of one clip, with audio; hence without padding.
    """
    seen: list[Tensor] = []
    with ExitStack() as stack:
        if isinstance(model.audio, AudioEncoder) and model.audio.inside is not None:
            _, layers = layers_of(model.audio.model)
            for layer in layers:
                stack.enter_context(watched(layer.attention, model.audio.inside.count, seen.append))
        else:
            assert model.fusion.cmpt is not None
            branch: Any = model.fusion.cmpt.branches[MODALITIES[AUDIO]]
            stack.enter_context(watched(branch.attention, len(branch.tokens), seen.append))
        model(batch)
    return torch.stack([weights[0].mean(0) for weights in seen])


@contextmanager
def watched(attention: Any, count: int, tell: Callable[[Tensor], None]) -> Iterator[None]:
    """While the block runs, `tell` gets the weights [B, heads, count, T] of the first `count` queries of each call.

    Args:
        attention: of WavLM, HuBERT, wav2vec 2.0, or ours (`promma.Attention`).
    """
    if isinstance(attention, wavlm.Attention):
        attention.watched, attention.watch = count, tell
        try:
            yield
        finally:
            del attention.watched, attention.watch
        return
    ours = isinstance(attention, Attention)
    heads = attention.heads if ours else attention.num_heads
    parts = (attention.query, attention.key) if ours else (attention.q_proj, attention.k_proj)
    outputs: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        exact = torch.promote_types(output.dtype, torch.float32)
        outputs.append(output.detach().to(exact).unflatten(-1, (heads, -1)).transpose(1, 2))

    def done(*_: Any) -> None:
        query, key = outputs
        outputs.clear()
        scores = query[:, :, :count] @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        tell(scores.softmax(-1))

    hooks = [part.register_forward_hook(note) for part in parts] + [attention.register_forward_hook(done)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write_attention(path: Path, model: DoubleFlow, split: ShardedSplit, collate: Collator, rows: Sequence[int]) -> None:
    """Safetensors of some rows of the split: `clip/KEY` [layers, K, 1 + T] fp16, the weight on all tokens together,
    then that on each frame; `targets` [K], numbers of the modalities; `frame_seconds` [1], 0 where audio comes as
    features. Clips without audio are left out. Nothing is written of a model that has no tokens in its audio. One rank
    calls this.
    """
    targets = heard_targets(model)
    if not targets:
        return
    assert model.fusion.cmpt is not None
    heard = [model.fusion.cmpt.targets.index(target) for target in targets]
    tokens = len(model.fusion.cmpt.targets)
    seconds = 0.0
    if isinstance(model.audio, AudioEncoder):
        seconds = float(np.prod(model.audio.model.config.conv_stride)) / SAMPLE_RATE
    tensors: dict[str, np.ndarray] = {
        "targets": np.array(targets, np.uint8),
        "frame_seconds": np.array([seconds], np.float32),
    }
    for row in rows:
        sample = split[row]
        if sample["audio"] is None:
            continue
        batch: Any = collate([{**sample, "real": True}])
        weights = token_attention(model, to_device(batch, device()))[:, heard]
        together = torch.cat([weights[..., :tokens].sum(-1, keepdim=True), weights[..., tokens:]], -1)
        tensors[CLIP + split.keys[row]] = together.cpu().numpy().astype(np.float16)
    save_file(tensors, path)
