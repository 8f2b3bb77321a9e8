"""Tiny random models of every family that transformers can generate text with, made from shrunken configs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Tokens that a model with a window sees back.
WINDOW = 8
VOCABULARY = 99
#: Models with more parameters are not tiny.
MOST_PARAMETERS = 9_000_000

#: Small values of config fields, by name. A field that a config lacks is left out.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "is_decoder": True,
    "tie_word_embeddings": False, "initializer_range": 0.15, "attention_dropout": 0.0, "use_cache": True,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim_model", "embedding_size",
                     "word_embed_proj_dim",
                     "input_embedding_size", "output_embedding_size", "backbone_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff", "dim_ff",
                     "d_inner", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
                     "moe_shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size",
                     "ffn_hidden_size", "dense_intermediate_size", "shared_experts_intermediate_size",
                     "feed_forward_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
                     "swa_num_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "kv_channels", "attention_head_size", "v_head_dim",
                     "qk_nope_head_dim", "qk_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_head_dim", "hidden_size_per_layer_input",
                     "laurel_rank", "adapter_rank", "router_hidden_size", "prompt_mid_dim"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "first_k_dense_replace", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx",
                     "context_length"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "local_attention", "sliding_window_size",
                     "attention_chunk_size", "local_attention_window_len"), WINDOW),
    **dict.fromkeys(("vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "index_n_heads": 2, "index_topk": 8, "query_pre_attn_scalar": 8, "num_kv_shared_layers": 0,
    "original_max_position_embeddings": 64, "state_size": 8, "mamba_d_state": 8, "prompt_length": 4,
}  # fmt: skip
_ALL_KEYS = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "num_hidden_layers": 10, "attn_layer_indices": [1, 3]}
_LAYERS = {"num_hidden_layers": 6}
_IMAGES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = {n: v for n, v in _SMALL.items() if n in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings",
)}  # fmt: skip
#: What single families need besides.
EXTRAS: dict[str, dict[str, Any]] = {
    "axk1": _ALL_KEYS,
    "axk2": _ALL_KEYS,
    "bailing_hybrid": _LAYERS | _ALL_KEYS,
    "bamba": _MAMBA,
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8}, "ffn_config": {
        "hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 1}},
    "deepseek_v2": _ALL_KEYS,
    "deepseek_v3": _ALL_KEYS,
    "deepseek_v32": _ALL_KEYS,
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": _ALL_KEYS},
    "dots3_note_text": _ALL_KEYS,
    "gemma3": {"vision_config": {**_IMAGES, "image_size": 28, "patch_size": 14}},
    "glm4_moe_lite": _ALL_KEYS,
    "glm_moe_dsa": _ALL_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "got_ocr2": {"text_config": {**_TEXT, "model_type": "qwen2"}, "vision_config": {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 16, "mlp_dim": 16}},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "jamba": _LAYERS,
    "kimi_linear": _LAYERS | _ALL_KEYS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": _LAYERS,
    "longcat_flash": _ALL_KEYS | {"head_dim": 4, "qk_head_dim": 12},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": _ALL_KEYS,
    "nemotron": _ALL_KEYS,
    "qwen3_5": {"text_config": _LAYERS},
    "qwen3_5_moe": {"text_config": _LAYERS},
    "qwen3_5_moe_text": _LAYERS,
    "qwen3_5_text": _LAYERS,
    "qwen3_next": _LAYERS,
    "qwen4_exp": {"text_config": _LAYERS},
    "qwen4_exp_text": _LAYERS,
    "recurrent_gemma": _LAYERS,
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "roc_bert": {"pronunciation_vocab_size": 40, "shape_vocab_size": 40, "shape_embed_dim": 16,
                 "pronunciation_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "youtu": _ALL_KEYS,
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
}  # fmt: skip
#: Families that are not tried, and why.
LEFT_OUT: dict[str, str] = {
    "blt": "large tables of bytes",
    "dots3_note": "its text part alone is tried",
    "fuyu": "large at any size of its parts",
    "gemma3n": "its image part needs the package timm; its text part alone is tried",
    "gemma4_assistant": "a draft of its own, no model by itself",
    "gemma4_unified": "large at any size of its parts; its text part alone is tried",
    "gemma4_unified_assistant": "a draft of its own, no model by itself",
    "longcat_flash": "plain generate fails at a small size",
    "moshi": "decodes sound beside text",
    "moss_transcribe_diarize": "large at any size of its parts",
    "musicgen": "decodes sound",
    "musicgen_melody": "decodes sound",
    "qwen4_exp": "no small config found",
    "qwen4_exp_text": "no small config found",
    "xlstm": "plain generate fails at a small size",
    "zamba2": "plain generate fails at a small size",
}
#: Other forms of a family: what it is, the family, and what it needs.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True}),
    "gpt_bigcode, heads": ("gpt_bigcode", {"multi_query": False}),
    "mistral, all": ("mistral", {"sliding_window": None}),
    "mixtral, window": ("mixtral", {"sliding_window": WINDOW}),
    "opt, post-norm": ("opt", {"do_layer_norm_before": False}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
}


def families() -> list[str]:
    """Return the model types of all causal language models."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])


def tiny_config(family: str) -> PreTrainedConfig:
    """Return a family's config in a small size."""
    kind, extras = VARIANTS.get(family, (family, {}))
    return _shrunk(CONFIG_MAPPING[kind], {**EXTRAS.get(kind, {}), **extras})


def _shrunk(kind: Any, extras: dict[str, Any]) -> PreTrainedConfig:
    known = {field.name: field for field in dataclasses.fields(kind)}
    renamed = set(getattr(kind, "attribute_map", {}).values())
    values = {name: value for name, value in _SMALL.items() if name in known or name in renamed}
    for name, part in getattr(kind, "sub_configs", {}).items():
        if part.__name__ != "AutoConfig":
            values[name] = _shrunk(part, extras.get(name, {})).to_dict()
    values |= {
        name: value for name, value in extras.items() if name not in values or not isinstance(values[name], dict)
    }
    # None in a config means that the family decides.
    kept = {n: v for n, v in values.items() if n in extras or n not in known or not _is_unset(known[n], n)}
    return kind(**kept)


def _is_unset(field: Any, name: str) -> bool:
    return field.default is None and name in ("n_inner", "sliding_window", "q_lora_rank")


def tiny_model(family: str, **options: Any) -> PreTrainedModel:
    """Return a family's model with random weights, whose answers do not settle into one token.

    Raises
    ------
    ValueError
        If it is not tiny.
    """
    torch.manual_seed(0)
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.25)
    settings = model.generation_config
    settings.eos_token_id, settings.forced_eos_token_id, settings.pad_token_id = None, None, 0
    return model
