"""A GGUF file as a model of transformers: its matrices stay in their blocks, its tokenizer comes out of it too."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speckv_online.cpu_engine.gguf_layers import GgufEmbedding, GgufLinear, why_not
from speckv_online.cpu_engine.verdicts import LARGE_BYTES, environment
from speckv_online.errors import UserError
from speckv_online.io.user_cache import cache_dir, key_of
from speckv_online.modeling.gguf_types import dequantize
from speckv_online.models.gguf_file import GgufFile, Tensor
from speckv_online.models.kept_model import FORMAT, KEPT, give_back_memory, stamps
from speckv_online.models.skeleton import without_weights

log = logging.getLogger(__name__)
#: Architectures of GGUF that are read; Mistral and SmolLM are written as ``llama``.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
#: A layer's tensors: GGUF's name, transformers'.
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_REST = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: Environment variable: 8 or 16 bits for the inputs of quantized matrices.
INPUTS = "SPECKV_GGUF_INPUTS"
#: Factors of the rotary frequencies, as Llama 3.1 has them.
_FACTORS = "rope_freqs.weight"


def level_of(file: GgufFile) -> str:
    """Return the name of the level that most weights of a file's layers are stored at."""
    sizes = Counter[str]()
    for name, tensor in file.tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            sizes[tensor.kind.level] += tensor.data.numel() // tensor.kind.bytes * tensor.kind.size
    if not sizes:
        raise file.wrong("it holds no layers of a model")
    return sizes.most_common(1)[0][0]


def read_config(file: GgufFile) -> Any:
    """Return the config of a file's model."""
    architecture = file.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise file.wrong(f"its architecture is {architecture[:40]!r}; {', '.join(ARCHITECTURES)} are read")

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    if file.fields.get(key("expert_count")):
        raise file.wrong("a mixture of experts is not read")
    scaling = file.text(key("rope.scaling.type"), "none")
    if scaling != "none":
        raise file.wrong(f"rotary embeddings scaled by {scaling[:40]!r} are not read")
    heads = file.integer(key("attention.head_count"))
    hidden = file.integer(key("embedding_length"))
    if "token_embd.weight" not in file.tensors:
        raise file.wrong("the tensor token_embd.weight is missing")
    size = file.integer(key("attention.key_length"), hidden // heads or None)
    if (
        file.integer(key("attention.value_length"), size) != size
        or file.integer(key("rope.dimension_count"), size) != size
    ):
        raise file.wrong("heads whose values or rotary embeddings have another size than their keys are not read")
    special = {
        name: found
        for name in ("bos", "eos", "padding")
        if type(found := file.fields.get(f"tokenizer.ggml.{name}_token_id")) is int
    }
    groups, layers = file.integer(key("attention.head_count_kv"), heads), file.integer(key("block_count"))
    fields = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.integer(key("feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": size,
        "max_position_embeddings": file.integer(key("context_length")),
        "rms_norm_eps": file.real(key("attention.layer_norm_rms_epsilon"), 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": file.real(key("rope.freq_base"), 10000.0)},
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
        "pad_token_id": special.get("padding"),
        "tie_word_embeddings": False,  # head and embedding read the same blocks, each in its own order
    }
    if heads % groups:
        raise file.wrong(f"{heads} heads and {groups} groups of keys do not fit")
    if layers > len(file.tensors):
        raise file.wrong(f"it says {layers} layers and has {len(file.tensors)} tensors")
    if architecture == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "mistral":
        fields["sliding_window"] = None
    try:
        return AutoConfig.for_model(architecture, **fields)
    except Exception as e:  # whatever transformers finds wrong with sizes
        raise file.wrong(f"its sizes do not fit each other: {' '.join(str(e.__cause__ or e).split())[:200]}") from e


@torch.no_grad()
def load_gguf(file: GgufFile, device: torch.device, engine: str) -> PreTrainedModel:
    """Return the model of a GGUF file, in eval mode.

    On a CPU with the engine its matrices stay in their blocks. Else they are de-quantized, to fp32 on a CPU and to
    fp16 on a GPU.
    """
    config = read_config(file)
    to = _rounding() if device.type == "cpu" and engine != "off" else ""
    if to:
        for kind in {t.kind for t in file.tensors.values() if len(t.shape) == 2}:
            if reason := why_not(kind, to):
                raise file.wrong(f"{reason}: give --engine off to de-quantize it")
    else:
        log.info("%s is de-quantized: its blocks are for CPUs with the engine", file.path.name)
    try:
        with without_weights():
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as e:
        raise file.wrong(f"transformers makes no model of its sizes: {' '.join(str(e).split())[:200]}") from e
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    unread, factors = dict(file.tensors), None
    if _FACTORS in unread:
        factors = _vector(file, unread.pop(_FACTORS), (config.head_dim // 2,))
    if "output.weight" not in unread:
        unread["output.weight"] = unread["token_embd.weight"]
    names = {f"{theirs}": ours for theirs, ours in _REST.items()}
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{theirs}": f"model.layers.{i}.{ours}" for theirs, ours in _LAYER.items()}
    large = bool(to) and sum(tensor.data.nbytes for tensor in file.tensors.values()) >= LARGE_BYTES
    key = key_of(FORMAT, str(file.path.resolve()), to, *stamps(file.path), *environment()) if large else ""
    _, kept = (KEPT.get(key) if large else None) or (None, {})
    for theirs, ours in names.items():
        _fill(file, model, unread, theirs, ours, to, dtype, kept.get(ours))
        file.forget()
    if unread:
        raise file.wrong(f"it has the tensor {min(unread)[:60]!r}, which is not known here")
    if factors is not None:
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq / factors
        rotary.original_inv_freq = rotary.inv_freq
    if large and not kept:
        _keep_layouts(model, key)
    ends = {file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    model.generation_config.eos_token_id = sorted(i for i in ends if type(i) is int) or None
    model.config.quantization_config = {"quant_method": level_of(file)}
    model.config.name_or_path = file.path.name
    return model.to(device).eval()


def _keep_layouts(model: nn.Module, key: str) -> None:
    """Keep what was laid out; it is mapped from then on, as at later starts."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GgufLinear)}
    if not KEPT.put(key, None, {name: layer.weight.detach() for name, layer in layers.items()}):
        return
    _, kept = KEPT.get(key) or (None, {})
    for name, weight in kept.items():
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    give_back_memory()


def _rounding() -> str:
    """Return how the inputs of quantized matrices are rounded, as the environment says."""
    bits = os.environ.get(INPUTS) or "8"
    if bits not in ("8", "16"):
        raise UserError(f"${INPUTS} must be 8 or 16, got {bits!r}")
    return f"b{bits}"


def _fill(
    file: GgufFile,
    model: Any,
    unread: dict[str, Tensor],
    theirs: str,
    ours: str,
    to: str,
    dtype: torch.dtype,
    kept: torch.Tensor | None,
) -> None:
    """Put the tensors of one module in its place, in blocks whose inputs are rounded in a way, or de-quantized.

    With what was ``kept`` the blocks need not be laid out.
    """
    parent, _, name = ours.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        module = owner.get_submodule(name)
    except AttributeError:  # norms of queries, of another architecture
        return
    tensor = unread.pop(f"{theirs}.weight", None)
    if tensor is None:
        raise file.wrong(f"the tensor {theirs}.weight is missing")
    expected = tuple(module.weight.shape)
    if tensor.shape != expected:
        raise file.wrong(f"{theirs}.weight has the shape {tensor.shape}, not {expected}")
    bias = getattr(module, "bias", None)
    if bias is not None:
        if f"{theirs}.bias" not in unread:
            raise file.wrong(f"the tensor {theirs}.bias is missing")
        bias = _vector(file, unread.pop(f"{theirs}.bias"), tuple(bias.shape)).to(dtype)
    if len(expected) == 1:
        module.weight = nn.Parameter(_vector(file, tensor, expected).to(dtype), requires_grad=False)
        return
    data = tensor.data
    if model.config.model_type == "llama" and theirs.endswith(("attn_q", "attn_k")):
        order = _halves(len(data), int(model.config.head_dim))
        data, bias = data if kept is not None else data[order], None if bias is None else bias[order]
    if to:
        made = (
            GgufEmbedding(data, tensor.kind)
            if ours.endswith("embed_tokens")
            else GgufLinear(data, tensor.kind, bias, to, kept)
        )
        setattr(owner, name, made)
        return
    module.weight = nn.Parameter(dequantize(data, tensor.kind).to(dtype), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)


def _halves(rows: int, size: int) -> torch.Tensor:
    """Return the order of rows in which a head's rotated pairs are its halves; in the file they are neighbours."""
    return torch.arange(rows).view(-1, size // 2, 2).transpose(1, 2).reshape(-1)


def _vector(file: GgufFile, tensor: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tensor.shape != shape or tensor.kind.bits:
        raise file.wrong(f"a vector of shape {tensor.shape} and type {tensor.kind.name} where {shape} is expected")
    return dequantize(tensor.data, tensor.kind).reshape(shape).clone()


def load_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file, chat template included, as transformers makes it.

    That takes seconds, so it is kept in the cache under the hash of the file's header.
    """
    folder = cache_dir() / "tokenizers" / hashlib.sha256(file.header).hexdigest()[:24]
    if (folder / "tokenizer.json").is_file():
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as e:  # a damaged folder is made again
            log.info("the tokenizer in %s is made again: %s", folder, " ".join(str(e).split())[:200])
    try:
        made = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as e:  # whatever transformers makes of a list that is missing or wrong
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise file.wrong(f"transformers makes no tokenizer of it: {reason}") from e
    _keep(made, folder)
    return made


def _keep(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer; the folder appears under its name when it is complete, or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            tokenizer.save_pretrained(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as e:
        log.info("the tokenizer is not kept: %s", e.strerror or e)


def check_level(file: GgufFile, asked: str | None) -> str:
    """Return a file's level; raises :class:`UserError` if another one is asked for."""
    found = level_of(file)
    if asked not in (None, found):
        raise UserError(f"{file.path.name} holds the level {found}, not {asked}: give {found}, or another file")
    return found
