"""The decoder inside a causal language model of transformers: its parts, and whether it can run packed.

Language models differ in position embeddings, windows, caps, sinks, scalings, layers with a state. Instead of a list of
what is known to be right, a small one of the same kind is tried: its states in a packed pass against those of
transformers' own eager attention, clip by clip.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dist_train.packed import NAME, TextStates, leave_before, pack
from sharding.errors import UserError

REMEDY = "Use a causal language model of text alone with attention in every layer, e.g. of Llama, Qwen, Mistral, Gemma."
LENGTHS = (7, 1, 5, 6)  # of the clips that are tried; the last one leaves below the upper layers
WINDOW = 3  # positions, in place of the model's window: shorter than most of them
TOLERANCE = 1e-3  # of the largest value; fp32 is a hundred times better, what is wrong a hundred times worse
ATTENTION = {"full_attention", "sliding_attention", "attention"}  # kinds of layers, as configurations name them
NORM = re.compile("norm|ln_f")  # in the name of what follows the last layer
SMALL = 64  # tokens, and the width of the MLP, of the model that is tried


def layers_of(causal: Any) -> nn.ModuleList:
    """The decoder's layers, whatever the model calls them.

    Raises:
        ValueError: there is no such list.
    """
    count = causal.config.num_hidden_layers
    for child in causal.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(f"its decoder has no list of {count} layers")


def norm_of(causal: Any) -> nn.Module:
    """What is applied to the last layer's output."""
    named = causal.get_decoder().named_children()
    return next((part for name, part in named if NORM.search(name) and "emb" not in name), nn.Identity())


def logits_of(causal: Any, states: Tensor) -> Tensor:
    """Logits [n, V] of last hidden states [n, H], scaled and capped as the model's own forward does."""
    logits: Tensor = causal.get_output_embeddings()(states)
    config = causal.config
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap


def check_length(config: PretrainedConfig, longest: int) -> None:
    """Refuses rows for which the model has no positions, or whose length would change those of the others.

    Learned positions end somewhere; factors of dynamic and longrope positions hang on the longest row of a pass.

    Args:
        longest: positions of the longest row.

    Raises:
        UserError: it is too long.
    """
    limit = position_limit(config)
    if limit is not None and longest > limit:
        raise UserError(
            "text",
            f"this {config.model_type} has positions for {limit} tokens and frames, a clip takes {longest}",
            "Lower audio.max_seconds, text.max_tokens or simulation.max_new_tokens, or use another language model.",
        )


def position_limit(config: PretrainedConfig) -> int | None:
    """Positions up to which those of a row do not hang on other rows; None: any number."""
    whole: int | None = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None)
    if not rotary:
        return whole
    each = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]
    found = next((part for part in each if part.get("rope_type") in ("dynamic", "longrope")), None)
    if found is None:
        return None
    first = "original_max_position_embeddings"
    return found.get(first) or getattr(config, first, None) or whole


def check_packs(config: PretrainedConfig, where: str) -> None:
    """Tries whether a model of this configuration gives the right states and logits in a packed pass.

    Args:
        config: of a causal language model.
        where: recipe key, for messages.

    Raises:
        UserError: it is no plain decoder, or what it gives is not what transformers' eager attention gives.
    """
    check_plain(config, where)
    problem = failure(json.dumps(small_fields(config), sort_keys=True, default=str))
    if problem:
        raise UserError(where, f"is a {config.model_type} model, which cannot run packed: {problem}", REMEDY)


def check_plain(config: PretrainedConfig, where: str) -> None:
    """What a configuration tells at a glance.

    Raises:
        UserError: it is no causal language model of text alone, or has layers with a state instead of attention.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(where, f"is an encoder-decoder ({kind}), not a causal language model", REMEDY)
    if config.get_text_config() is not config:
        raise UserError(
            where,
            f"is a model of several modalities ({kind}); the packed pass runs a language model alone",
            "Give its text model (of gemma3: gemma3_text), or another language model.",
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(where, f"is a {kind} model, not a causal language model", REMEDY)
    other = set(kinds_of(config)) - ATTENTION
    if other:
        raise UserError(where, f"is a {kind} model with layers of {', '.join(sorted(other))}", REMEDY)


def kinds_of(config: PretrainedConfig) -> list[str]:
    """Kind of each layer, where the configuration tells."""
    named = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return list(named or [])


def small_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Fields of a model of the same kind with few layers and tokens, and short windows."""
    fields, kinds = config.to_dict(), kinds_of(config)
    # All kinds of layers among the lowest ones, and two at least.
    layers = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    layers = min(layers, config.num_hidden_layers)
    fields |= {"num_hidden_layers": layers, "vocab_size": SMALL, "tie_word_embeddings": config.tie_word_embeddings}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name in ("intermediate_size", "moe_intermediate_size"):
        if fields.get(name) is not None:
            fields[name] = SMALL
    if fields.get("layer_types"):
        fields["layer_types"] = kinds[:layers]
    for name in ("sliding_window", "attention_chunk_size"):
        if fields.get(name) is not None:
            fields[name] = WINDOW
    for name in ("quantization_config", "dtype", "architectures", "id2label", "label2id"):
        fields.pop(name, None)
    return fields


@cache
def failure(fields: str) -> str:
    """What is wrong with packing a model of these fields (as JSON), or nothing."""
    try:
        # What is checked must not change a run.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            config = AutoConfig.for_model(**json.loads(fields))
            causal: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            causal = causal.float().eval()
            return next(differences(causal), "")
    except Exception as error:  # whatever it raises, this kind of model does not fit
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def differences(causal: Any) -> Iterator[str]:
    """Compares the passes of a model with random weights, which are made large: everything shall matter."""
    for parameter in causal.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    decoder, layers = causal.get_decoder(), layers_of(causal)
    width, count = causal.get_input_embeddings().weight.shape[1], len(layers)
    clips = [torch.randn(1, length, width) for length in LENGTHS]

    def run(**inputs: Any) -> list[Tensor]:
        return list(decoder(**inputs, output_hidden_states=True, use_cache=False).hidden_states)

    causal.set_attn_implementation("eager")
    alone = [run(inputs_embeds=clip) for clip in clips]
    logits = [causal(inputs_embeds=clip, use_cache=False).logits[0] for clip in clips]
    causal.set_attn_implementation(NAME)

    # Decoding: padded on the left.
    longest = max(LENGTHS)
    left = [torch.cat([clip.new_zeros(1, longest - clip.shape[1], width), clip], 1) for clip in clips]
    mask = torch.arange(longest) >= longest - torch.tensor(LENGTHS)[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = causal(
        inputs_embeds=torch.cat(left), attention_mask=mask.long(), position_ids=positions, use_cache=False
    ).logits
    for row, wanted in zip(padded, logits, strict=True):
        if differ(row[-len(wanted) :], wanted):
            yield "its logits in a padded batch are not those of each clip alone"

    upper = max(1, count - 1)
    leave_before(layers[upper:])
    embeds, segments = pack(
        [TextStates(clip, torch.ones(clip.shape[:2], dtype=torch.bool)) for clip in clips], len(clips) - 1
    )
    states = run(
        inputs_embeds=embeds,
        position_ids=segments.positions,
        attention_mask=embeds.new_empty(0, 0, 0, 0),
        segments=segments,
    )
    if len(states) != count + 1:
        yield f"it gives {len(states)} hidden states from {count} layers"
        return
    for index, state in enumerate(states):
        # What leaves is last seen below the upper layers, and as those who stay see it.
        kept = len(clips) - (index > upper)
        wanted = torch.cat([clip[index][0] for clip in alone[:kept]])
        if state.shape[1] != len(wanted):
            yield f"hidden state {index} has {state.shape[1]} positions instead of {len(wanted)}"
        elif differ(state[0], wanted):
            yield f"hidden state {index} differs from that of each clip alone"
    if differ(logits_of(causal, states[-1][0]), torch.cat(logits[:-1])):
        yield "its logits are not made of its last hidden state by the output layer alone"


def differ(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors differ by more than rounding."""
    return not bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
