"""What a decoder makes of the models and names that a user hands it, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from speckv_online.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_ATTENTION = {"full_attention", "sliding_attention"}
_NO_WAY_BACK = "cannot go back to before a rejected token: not supported"


#: Classes of transformers whose forwards need nothing but ids and a cache, alone and in batches, whatever their config.
KNOWN = frozenset({
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "GemmaForCausalLM", "GPT2LMHeadModel",
    "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
})  # fmt: skip


def is_known(kind: type) -> bool:
    """Return True for exactly the classes of :data:`KNOWN`, and not for subclasses of them."""
    return kind.__name__ in KNOWN and kind.__module__.startswith("transformers.models.")


def forward_arguments(kind: type[PreTrainedModel]) -> frozenset[str]:
    """Return the names of the arguments that the forward of a class of models takes."""
    return _arguments(kind.forward)


@lru_cache(maxsize=256)
def _arguments(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(signature(function).parameters)


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


def longest_of(model: PreTrainedModel) -> int:
    """Return the most tokens that a model's text may have."""
    config = text_config(model)
    for name in ("max_position_embeddings", "max_target_positions"):
        most = getattr(config, name, None)
        if isinstance(most, int) and most > 0:  # XLNet has -1 for any number
            return most
    return 1 << 30


def embedded_of(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model has an embedding for."""
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def sizes_of(*models: PreTrainedModel | None) -> tuple[object, ...]:
    """Return what decides whether models fit each other and the decoder; it changes where they are resized."""
    found: list[object] = []
    for model in models:
        if model is not None:
            config = text_config(model)
            found += [int(config.vocab_size), embedded_of(model), int(config.num_hidden_layers)]
    return tuple(found)


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
