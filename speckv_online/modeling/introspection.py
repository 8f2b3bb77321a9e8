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


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of the language model, also where a model has other parts besides."""
    return model.config.get_text_config(decoder=True)


def check_model(model: PreTrainedModel, role: str) -> None:
    """Raise :class:`UserError` unless the decoder can drive this model: decoder-only, attention layers only."""
    if model.config.is_encoder_decoder:
        raise UserError(f"the {role} is an encoder-decoder model: only decoder-only models are supported")
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds - _ATTENTION:
        other = ", ".join(sorted(kinds - _ATTENTION)) or "a recurrent state"
        raise UserError(f"the {role} has {other}, which cannot go back to before a rejected token: not supported")


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
