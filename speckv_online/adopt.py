"""What a decoder makes of the models and names that a user hands it, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policies.base import Policy, PolicyError
from policies.guard import FaultGuard
from policies.registry import make_policy
from speckv_online.drafters import Drafter, ModelDrafter
from speckv_online.errors import UserError
from speckv_online.models import check_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Vocabularies of one tokenizer differ by padding only; more than this share of their size is another tokenizer.
MAX_PADDING = 0.05

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_ATTENTION = {"full_attention", "sliding_attention"}


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of the language model, also where a model has other parts besides."""
    return model.config.get_text_config(decoder=True)


def as_policy(policy: Policy | str) -> FaultGuard:
    """Return a guarded policy; a string is a spec of :mod:`policies.registry`.

    Raises
    ------
    UserError
        If the spec names no policy.
    """
    if isinstance(policy, str):
        try:
            policy = make_policy(policy)
        except PolicyError as error:
            raise UserError(str(error)) from error
    return policy if isinstance(policy, FaultGuard) else FaultGuard(policy)


def as_drafter(draft: Drafter | PreTrainedModel | None, target: PreTrainedModel) -> Drafter | None:
    """Return the drafter that ``draft`` is, or that drafts with this model.

    Raises
    ------
    UserError
        If the model cannot draft for the target.
    """
    if isinstance(draft, str):
        raise UserError(f"the draft must be a loaded model or a drafter, not the name {draft!r}: load it first")
    if not isinstance(draft, PreTrainedModel):
        return draft
    check_model(draft, "draft")
    check_vocabularies(target, draft)
    return ModelDrafter(draft, int(text_config(target).vocab_size))


def check_model(model: PreTrainedModel, role: str) -> None:
    """Raise :class:`UserError` unless the decoder can drive this model: decoder-only, attention layers only."""
    if model.config.is_encoder_decoder:
        raise UserError(f"the {role} is an encoder-decoder model: only decoder-only models are supported")
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds - _ATTENTION:
        other = ", ".join(sorted(kinds - _ATTENTION)) or "a recurrent state"
        raise UserError(f"the {role} has {other}, which cannot go back to before a rejected token: not supported")


def check_vocabularies(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Raise :class:`UserError` if the two models' tokenizers are known, or seen from their sizes, to differ."""
    a, b = int(text_config(target).vocab_size), int(text_config(draft).vocab_size)
    if abs(a - b) > MAX_PADDING * max(a, b):
        raise UserError(
            f"target and draft have vocabularies of {a} and {b} tokens, more than padding apart: "
            "use a draft of the target's own family"
        )
    tokenizers = [known_tokenizer(model) for model in (target, draft)]
    if tokenizers[0] is not None and tokenizers[1] is not None:
        check_tokenizers(tokenizers[0], tokenizers[1])


def known_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies beside the model's weights on this machine, or None."""
    source = model.config._name_or_path
    if not source:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception:  # a folder without a tokenizer fails in many ways, and each means that it is not known
        return None


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
