"""The recipe's model and micro-batches without data, and one traced micro-step of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from dist_train import packed as packing
from dist_train import wavlm
from dist_train.batch import Batch
from dist_train.build import build_model
from dist_train.fusion import FlowOutput
from dist_train.global_loss import FLOW, Packed, pack
from dist_train.losses import double_flow_loss, transcription_loss
from dist_train.missing import draw_dropped
from dist_train.model import DoubleFlow
from dist_train.packed import TextStates, Tokens
from dist_train.plan_quantised import finish_quantised, products_on_cpu
from dist_train.recipe import Recipe
from dist_train.rollout import evaluating
from sharding.plan_trace import Trace, Tracer

aten = torch.ops.aten


class Clip(NamedTuple):
    """How long a clip is; 0 = the modality is absent.

    Args:
        audio: samples of the waveform, or frames of features.
        text: tokens with BOS, or steps of features.
        vision: frames.
        answer: tokens of the answer that the language model gives to it.
        simulated: steps of features of imagined text.
    """

    audio: int
    text: int
    vision: int
    answer: int
    simulated: int = 0


def build_hollow(recipe: Recipe, tokenizer: Any) -> DoubleFlow:
    """The model of `build_model`, without data."""
    with torch.device("meta"):
        model = build_model(recipe, tokenizer)
    finish_quantised(model)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_floating_point():
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")  # token ids and the like: any will do
    return model


def hollow_batch(recipe: Recipe, model: DoubleFlow, clips: Sequence[Clip], tracer: Tracer) -> Batch:
    """The micro-batch that `Collator` makes of such clips, without data."""
    widths = recipe.widths
    sound = None if recipe.audio.input == "waveform" else widths.audio
    words = None if recipe.text.input == "transcript" else widths.text
    dropped = draw_dropped(recipe.missing, torch.ones(len(clips), 3), range(len(clips)), recipe.seed, epoch=0)
    with tracer:
        audio, audio_mask = hollow(
            [max(clip.audio, model.audio.minimum_samples) for clip in clips], sound, torch.float32
        )
        text, text_mask = hollow(
            [max(clip.text, 1) for clip in clips], words, torch.long if words is None else torch.float32
        )
        vision, vision_mask = hollow([max(clip.vision, 1) for clip in clips], widths.vision, torch.float32)
        answer, answer_mask = hollow([max(clip.answer, 1) for clip in clips], None, torch.long)
        batch = Batch(
            audio=audio,
            audio_mask=audio_mask,
            audio_present=torch.tensor([clip.audio > 0 for clip in clips]),
            text=text,
            text_mask=text_mask,
            text_present=torch.tensor([clip.text > 0 for clip in clips]),
            vision=vision,
            vision_mask=vision_mask,
            vision_present=torch.tensor([clip.vision > 0 for clip in clips]),
            label=torch.zeros(len(clips)),
            real=torch.ones(len(clips), dtype=torch.bool),
            index=torch.arange(len(clips)),
            dropped=dropped,
            set_aside=[],
            answer=answer,
            answer_mask=answer_mask,
        )
        if recipe.simulation.rollout == "features":
            simulated, simulated_mask = hollow(
                [max(clip.simulated, 1) for clip in clips], widths.simulated, torch.float32
            )
            present = torch.tensor([clip.simulated > 0 for clip in clips])
            batch |= {"simulated": simulated, "simulated_mask": simulated_mask, "simulated_present": present}
        return batch


def hollow(lengths: Sequence[int], width: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, T(, width)] and its mask [B, T]."""
    longest = max(lengths)
    shape = (len(lengths), longest) if width is None else (len(lengths), longest, width)
    return torch.zeros(shape, dtype=dtype), torch.arange(longest) < torch.tensor(lengths)[:, None]


def trace_step(
    recipe: Recipe, model: DoubleFlow, batch: Batch, tracer: Tracer, *, rows: int, real: int | None = None
) -> tuple[Trace, int, int]:
    """Forward, loss and backward of one micro-step; decoding is the phase `decode`.

    Args:
        rows: that the ranks gather for the loss, fillers included.
        real: clips among them, over which the loss is taken; default: all.

    Returns:
        The trace, bytes of the row that a clip exchanges, passages through the language model's layers (see Flows).
    """
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    tracer.trace = Trace()
    model.train()
    with tracer.recording(model, tensors) as trace, own_kernels(tracer), decoding(model, tracer):
        flows = model(batch)
        packed = pack(flows, batch)
        row_bytes, passages = packed.rows.shape[1] * packed.rows.element_size(), int(flows.passages)
        del flows
        kept = hollow_loss(recipe, packed, rows, rows if real is None else real)
        surrogate = (packed.rows * kept[0][: len(packed.rows)]).sum() * 1.0
        tracer.phase = "backward"
        surrogate.backward()
    return trace, row_bytes, passages


def hollow_loss(recipe: Recipe, packed: Packed, rows: int, real: int) -> tuple[Tensor, Tensor]:
    """What `global_loss` does with the rows of all ranks, and what it keeps of them: their gradient and a copy."""
    whole = packed.rows.new_zeros(rows, packed.rows.shape[1]).requires_grad_()
    chosen = whole.index_select(0, torch.arange(real))
    *columns, label, taught, _, _ = chosen.split([*(shape.numel() for shape in packed.shapes), 1, 1, 1, 2], 1)
    parts = [column.reshape(real, *shape) for column, shape in zip(columns, packed.shapes, strict=True)]
    complete, missing, asr = FlowOutput(*parts[:FLOW]), FlowOutput(*parts[FLOW : 2 * FLOW]), parts[2 * FLOW]
    notes = dict(zip(packed.notes, parts[2 * FLOW + 1 :], strict=True))
    loss, _ = double_flow_loss(complete, missing, label[:, 0].detach(), taught[:, 0] > 0, recipe.loss, notes)
    if recipe.loss.asr > 0:
        loss = loss + recipe.loss.asr * transcription_loss(asr)
    (gradient,) = torch.autograd.grad(loss, whole)
    return gradient, chosen.detach()


@contextmanager
def decoding(model: DoubleFlow, tracer: Tracer) -> Iterator[None]:
    """While active, the model's answers are those of the batch, and the decoding they take is traced."""
    llm = model.llm
    if llm is None:
        yield
        return
    given = llm.answers

    def answers(audio: TextStates, wanted: Tensor, known: Tokens | None) -> Tokens:
        assert known is not None
        phase, tracer.phase = tracer.phase, "decode"
        rows = wanted.nonzero().squeeze(1)
        if len(rows):
            prefix = int(audio.mask[rows].sum(1).max()) + len(llm.prompt)
            steps = int(known.mask[rows].sum(1).max())
            decode_hollow(llm.causal, audio.states, len(rows) * model.llm.simulation.beams, prefix, steps, tracer)
        tracer.phase = phase
        return given(audio, wanted, known)

    llm.answers = answers  # type: ignore[method-assign]
    try:
        yield
    finally:
        del llm.answers


@torch.no_grad()
def decode_hollow(causal: Any, like: Tensor, rows: int, prefix: int, steps: int, tracer: Tracer) -> None:
    """A pass over the prefixes and `steps` - 1 passes over one token each, with a full cache of keys and values (of
    layers with a window: what fits into it).
    """
    with evaluating(causal):
        embeds = like.new_zeros(rows, prefix, like.shape[-1])
        cache = causal(
            inputs_embeds=embeds,
            attention_mask=torch.ones(rows, prefix, dtype=torch.long),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        shapes = [[(state.shape[1], state.shape[3]) for state in (kept.keys, kept.values)] for kept in cache.layers]
        del embeds, cache
        if steps < 2:
            return
        cache = DynamicCache(config=causal.config)
        length = prefix + steps - 2
        for layer, both in enumerate(shapes):
            keys, values = (like.new_zeros(rows, heads, length, width) for heads, width in both)
            cache.update(keys, values, layer)
        del keys, values
        with tracer.repeated(steps - 1):
            causal(
                input_ids=torch.zeros(rows, 1, dtype=torch.long),
                attention_mask=torch.ones(rows, length + 1, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
            )


@contextmanager
def own_kernels(tracer: Tracer) -> Iterator[None]:
    """While active, our own attention chooses what it chooses on the device that is planned for."""
    kept = packing.varlen_kernel, wavlm.ON_ACCELERATOR, wavlm.Dropout
    if tracer.cuda:
        packing.varlen_kernel = varlen_kernel
    else:
        wavlm.ON_ACCELERATOR = wavlm.ON_CPU
    wavlm.Dropout = Drop  # type: ignore[misc]
    try:
        with nullcontext() if tracer.cuda else products_on_cpu():
            yield
    finally:
        packing.varlen_kernel, wavlm.ON_ACCELERATOR, wavlm.Dropout = kept  # type: ignore[misc]


class Drop(wavlm.Dropout):
    """Dropout without a generator: there is none for tensors without data."""

    def __init__(self, probability: float, seed: int, device: torch.device) -> None:
        super().__init__(probability, seed, torch.device("cpu"))
        self.generator = None


def varlen_kernel(query: Tensor, dropout: float, softcap: float | None = None) -> Callable[..., Tensor] | None:
    """`packed.varlen_kernel` for a GPU from Ampere on."""
    return varlen if query.dtype == torch.bfloat16 and softcap is None else None


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: packing.Segments,
    dropout: float,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """Flash attention over segments [N, heads, D] without padding; what a window spares is counted all the same."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
    offsets, longest = segments.offsets, segments.longest
    return aten._flash_attention_forward(
        query, key, value, offsets, offsets, longest, longest, dropout, True, False, scale=scale
    )[0]
