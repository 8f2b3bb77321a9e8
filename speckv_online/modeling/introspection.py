"""What a decoder makes of the models and names that a user hands it, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from speckv_online.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_ATTENTION = {"full_attention", "sliding_attention"}
_NO_WAY_BACK = "cannot go back to before a rejected token: not supported"


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of the language model, also where a model has other parts besides."""
    return model.config.get_text_config(decoder=True)


def check_model(model: PreTrainedModel, role: str) -> None:
    """Raise :class:`UserError` unless the decoder can drive this model: decoder-only, attention layers only."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise UserError(f"the {role} must be a loaded model of transformers, got {type(model).__name__}: load it first")
    check_config(model.config, role)
    if getattr(model, "_is_stateful", False):
        raise UserError(f"the {role} has a recurrent state, which {_NO_WAY_BACK}")


def check_config(config: PreTrainedConfig, role: str) -> None:
    """Raise :class:`UserError` where a model's config tells that the decoder cannot drive it."""
    if config.is_encoder_decoder:
        raise UserError(f"the {role} is an encoder-decoder model: only decoder-only models are supported")
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if other := sorted(kinds - _ATTENTION):
        raise UserError(f"the {role} has {', '.join(other)}, which {_NO_WAY_BACK}")


def eos_of(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end a sequence by the model's generation config."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def level_of(model: PreTrainedModel) -> str:
    """Return the name of the compression level that a loaded model is at, e.g. ``nf4``, ``bf16`` or ``gptq-4bit``."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return _DTYPES.get(model.dtype, str(model.dtype).removeprefix("torch."))
    found = config if isinstance(config, dict) else config.to_dict()
    if found.get("load_in_8bit"):
        return "int8"
    if found.get("load_in_4bit"):
        return str(found.get("bnb_4bit_quant_type", "fp4"))
    method = getattr(found.get("quant_method"), "value", found.get("quant_method")) or "quantized"
    bits = found.get("bits")
    return f"{method}-{bits}bit" if bits else str(method)
