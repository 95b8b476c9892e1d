"""WavLM as its authors published it (`WavLM-Large.pt`: {"cfg", "model"}, fairseq's names) → transformers' WavLM.

The map follows the two models' module names (microsoft/unilm wavlm/WavLM.py, MIT; transformers' modeling_wavlm.py).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from transformers import WavLMConfig

from dist_train.pretrained import MOST_LAYERS, layer_problems
from sharding.errors import UserError
from tools.convert.base import stock_shapes
from tools.convert.held import Held
from tools.convert.pickles import keys_of, load_pickle, tensors_of
from tools.convert.source import PREFIX, Context, Source, in_memory, select

# Beginnings of original names → transformers' beginnings.
WHOLE = {
    "mask_emb": "masked_spec_embed",
    "layer_norm.": "feature_projection.layer_norm.",
    "post_extract_proj.": "feature_projection.projection.",
    "encoder.pos_conv.0.bias": "encoder.pos_conv_embed.conv.bias",
    "encoder.pos_conv.0.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv.0.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    "encoder.layer_norm.": "encoder.layer_norm.",
}
CONVOLUTION = {"0.": "conv.", "2.1.": "layer_norm.", "2.": "layer_norm."}  # 2.1: a norm over channels; 2: over time
LAYER = {
    "self_attn.q_proj.": "attention.q_proj.",
    "self_attn.k_proj.": "attention.k_proj.",
    "self_attn.v_proj.": "attention.v_proj.",
    "self_attn.out_proj.": "attention.out_proj.",
    "self_attn.grep_linear.": "attention.gru_rel_pos_linear.",
    "self_attn.grep_a": "attention.gru_rel_pos_const",
    "self_attn.relative_attention_bias.": "attention.rel_attn_embed.",
    "self_attn_layer_norm.": "layer_norm.",
    "fc1.": "feed_forward.intermediate_dense.",
    "fc2.": "feed_forward.output_dense.",
    "final_layer_norm.": "final_layer_norm.",
}
# What our configuration takes over: its name, ours.
PLAIN = {
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "activation_fn": "hidden_act",
    "layer_norm_first": "do_stable_layer_norm",
    "conv_bias": "conv_bias",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_bucket_distance",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "feat_proj_dropout",
    "encoder_layerdrop": "layerdrop",
    "mask_prob": "mask_time_prob",
    "mask_length": "mask_time_length",
    "mask_channel_prob": "mask_feature_prob",
    "mask_channel_length": "mask_feature_length",
}


def detect(path: Path) -> bool:
    """Whether a file holds `cfg` and a WavLM's `model`."""
    return path.is_file() and {"cfg", "model", "post_extract_proj.weight", "mask_emb"} <= keys_of(path)


def our_name(original: str) -> str | None:
    """An original name → transformers'; None for what transformers' model does not have."""
    numbered = re.fullmatch(r"(feature_extractor\.conv_layers|encoder\.layers)\.(\d+)\.(.+)", original)
    if numbered is None:
        return begun(original, WHOLE)
    stack, number, inner = numbered.groups()
    ours = begun(inner, LAYER if stack == "encoder.layers" else CONVOLUTION)
    return None if ours is None else f"{stack}.{number}.{ours}"


def begun(name: str, beginnings: dict[str, str]) -> str | None:
    """The name with another beginning; None where none fits."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def read(path: Path, context: Context) -> Source:
    """A published WavLM.

    Raises:
        UserError: it cannot be read, is refused, or has settings that transformers' WavLM does not know.
    """
    held = load_pickle(path)
    found = tensors_of(held["model"], path)
    config = read_config(held["cfg"], path)
    names = {ours: key for key in found if (ours := our_name(key)) is not None}
    wanted = stock_shapes(config, "audio")
    odd = sorted(wanted.keys() ^ names.keys())
    if odd:
        raise UserError(str(path), f"and its cfg do not agree on {odd[0]}", "Give a file as the authors published it.")
    for name, shape in wanted.items():
        if list(found[names[name]].shape) != shape:
            raise UserError(
                str(path), f"has {names[name]} of shape {list(found[names[name]].shape)}, its cfg says {shape}",
                "Give a file as the authors published it.",
            )  # fmt: skip
    left = sorted(found.keys() - set(names.values()))
    return Source(
        Held(select(in_memory(found), {f"{PREFIX['audio']}{ours}": key for ours, key in names.items()})),
        [path],
        models={"audio": config},
        left_out=[f"{len(left)} weights that WavLM does not use ({', '.join(left[:3])})"] if left else [],
    )


def read_config(cfg: Any, path: Path) -> WavLMConfig:
    """transformers' configuration from the original one.

    Raises:
        UserError: it lacks something, or asks for what transformers does not have.
    """
    remedy = "Give a file as the authors published it."
    try:
        layers = conv_layers(cfg["conv_feature_layers"])
        fields = {ours: cfg[key] for key, ours in PLAIN.items() if key in cfg}
        mode = cfg["extractor_mode"]
        fields["hidden_size"], fields["num_hidden_layers"]
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise UserError(str(path), f"has a cfg that is not WavLM's ({error!r})", remedy) from None
    too_deep = next(layer_problems({"encoder_layers": cfg["encoder_layers"]}, str(path)), None)
    if too_deep is not None:
        raise too_deep
    if not (cfg.get("relative_position_embedding") and cfg.get("gru_rel_pos")):
        raise UserError(str(path), "has no gated relative position bias: it is no WavLM", remedy)
    if cfg.get("activation_fn") == "glu":
        raise UserError(str(path), "has activation_fn glu, which transformers' WavLM lacks", remedy)
    fields |= {
        "conv_dim": [layer[0] for layer in layers],
        "conv_kernel": [layer[1] for layer in layers],
        "conv_stride": [layer[2] for layer in layers],
        "feat_extract_norm": "layer" if mode == "layer_norm" else "group",
        "architectures": ["WavLMModel"],
    }
    try:
        return WavLMConfig(**fields)
    except Exception as error:  # transformers checks kinds and sizes by exceptions of its own
        raise UserError(str(path), f"has a cfg that is not WavLM's ({' '.join(str(error).split())})", remedy) from None


def conv_layers(text: str) -> list[tuple[int, int, int]]:
    """`[(512,10,5)] + [(512,3,2)] * 4` → its (width, kernel, stride), read without evaluating code.

    Raises:
        ValueError, SyntaxError: it is something else.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right = value(node.left), value(node.right)
            if not (isinstance(right, int) and right <= MOST_LAYERS):
                raise ValueError(text)
            return left * right
        return ast.literal_eval(node)

    if len(text) > MOST_LAYERS:
        raise ValueError(f"{text[:40]}…")
    found = value(ast.parse(text.strip(), mode="eval").body)
    if not all(isinstance(layer, tuple) and len(layer) == 3 for layer in found):
        raise ValueError(text)
    return found
