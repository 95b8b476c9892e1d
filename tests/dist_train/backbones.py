"""Tiny configurations of each kind of language model and speech encoder, with what sets the kind apart."""

from __future__ import annotations

from typing import Any

WIDE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip

# Windows are shorter than the texts; width per head is another than hidden_size / heads.
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {**WIDE, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {**WIDE, "model_type": "qwen3", "head_dim": 6},
    "mistral": {**WIDE, "model_type": "mistral", "sliding_window": 5},
    "gemma": {**WIDE, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1},
    "gemma2": {
        **WIDE, "model_type": "gemma2", "head_dim": 8, "sliding_window": 4,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8,
    },
    "gemma3": {
        **WIDE, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {**WIDE, "model_type": "granite", "logits_scaling": 3.0, "residual_multiplier": 0.5},
}  # fmt: skip

CONVOLUTIONS: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": [8] * 7, "initializer_range": 0.2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
}  # fmt: skip
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False}

ENCODERS: dict[str, dict[str, Any]] = {
    "hubert": {**CONVOLUTIONS, **LARGE, "model_type": "hubert"},
    "hubert base": {**CONVOLUTIONS, **BASE, "model_type": "hubert"},
    "wav2vec2": {**CONVOLUTIONS, **LARGE, "model_type": "wav2vec2"},
    "wav2vec2 base": {**CONVOLUTIONS, **BASE, "model_type": "wav2vec2"},
    "wavlm base": {**CONVOLUTIONS, **BASE, "model_type": "wavlm", "num_buckets": 16},
    "whisper": {
        "model_type": "whisper", "d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24,
        "init_std": 0.2, "num_mel_bins": 80, "max_source_positions": 1500, "vocab_size": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    },
}  # fmt: skip
