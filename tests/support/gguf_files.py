"""Small GGUF files, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support.tiny_models import tiny_tokenizer

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def small_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A random model of 272 tokens whose sizes the engine takes."""
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }  # fmt: skip
    config, model = kinds[family]
    torch.manual_seed(6)
    sizes: dict[str, Any] = {
        "vocab_size": 272, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 400,
        "tie_word_embeddings": False, "initializer_range": 0.1, "eos_token_id": 0, "bos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip
    made = model(config(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.3 * torch.randn_like(p))
    return made


def named(ours: str) -> str:
    """Return GGUF's name of a parameter."""
    module, _, kind = ours.rpartition(".")
    if module in _REST:
        return f"{_REST[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}.{kind}"


def neighbours(rows: np.ndarray, size: int) -> np.ndarray:
    """Put the halves of a head's rows, which are rotated together, side by side, as llama's files have them."""
    return np.ascontiguousarray(rows.reshape(-1, 2, size // 2, *rows.shape[1:]).swapaxes(1, 2)).reshape(rows.shape)


def write_gguf(
    path: Path, model: PreTrainedModel, kind: str = "Q4_1", mixed: dict[str, str] | None = None, **fields: Any
) -> Path:
    """Write a model, its matrices in a type; ``mixed`` has other types for some tensors, ``fields`` other numbers."""
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = [token for token, _ in sorted(tiny_tokenizer(14).get_vocab().items(), key=lambda item: item[1])] + ["Ġt"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<eos>" else 1 for token in tokens])
    writer.add_token_merges(["Ġ t"])
    writer.add_eos_token_id(0)
    for name, value in fields.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name.replace("__", "."), value)
    for ours, value in model.state_dict().items():
        name, numbers = named(ours), value.float().numpy()
        if family == "llama" and ("q_proj" in ours or "k_proj" in ours):
            numbers = neighbours(numbers, config.head_dim)
        stored = (mixed or {}).get(name, kind) if numbers.ndim == 2 else "F32"
        number = gguf.GGMLQuantizationType[stored]
        if stored in ("F32", "F16"):
            writer.add_tensor(name, numbers.astype(np.float16 if stored == "F16" else np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(numbers, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
