"""GGUF files that both engines read: the default target at other types, its draft, a larger Llama of random weights.

Each is written once, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speckv_online.errors import UserError
from speckv_online.models.distilled_draft import load_shipped_draft
from speckv_online.models.pairs import DEFAULT_PAIR, prepare
from speckv_online.models.smollm2 import find_gguf

#: Formats by the names that options give them.
FORMATS = ("f16", "q8_0", "q4_1")
#: A tensor's shape, rows first, and what makes its values.
Tensor = tuple[tuple[int, ...], Callable[[], np.ndarray]]
_DRAFT = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    groups: int
    intermediate: int
    vocabulary: int
    context: int = 2048


#: Larger models by name: TinyLlama's shape.
SHAPES = {"1.1b": Shape(2048, 22, 32, 4, 5632, 32000)}


def library() -> Any:
    """Return the package that reads and writes the files."""
    try:
        import gguf
    except ModuleNotFoundError as e:
        raise UserError("the package gguf is not installed: pip install 'speckv-online[peers]'") from e
    return gguf


def target_file(kind: str, folder: Path, shape: str) -> Path:
    """Return the file of a target at a format; it is written if it is not there."""
    if shape == DEFAULT_PAIR:
        shipped = find_gguf()
        if kind == "q4_1":
            return shipped
        return made(folder / f"{shape}-{kind}.gguf", lambda out: rewrite(shipped, out, kind))
    return made(folder / f"random-{shape}-{kind}.gguf", lambda out: write_random(out, kind, SHAPES[shape]))


def made(path: Path, write: Callable[[Path], None]) -> Path:
    """Return a file, written whole or not at all if it is not there."""
    if not path.is_file():
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            partial.replace(path)
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror or e}") from e
        finally:
            partial.unlink(missing_ok=True)
    return path


def rewrite(source: Path, out: Path, kind: str) -> None:
    """Write a file's weights at another type."""
    gguf = library()
    reader = gguf.GGUFReader(source)

    def values(t: Any) -> Tensor:
        shape = tuple(int(n) for n in reversed(t.shape))
        return shape, lambda: gguf.quants.dequantize(t.data, t.tensor_type).reshape(shape)

    _write(out, _fields(reader), {t.name: values(t) for t in reader.tensors}, kind)


def write_draft(out: Path) -> None:
    """Write the default draft, with all rows of the target's head, as Q8_0: our own has 8 bits too."""
    model, _, _ = load_shipped_draft(prepare(DEFAULT_PAIR), torch.device("cpu"), full_head=True)
    config, weights = model.config, {name: t.detach() for name, t in model.state_dict().items()}
    fields = _fields(library().GGUFReader(find_gguf()))
    fields["llama.block_count"] = (config.num_hidden_layers, *fields["llama.block_count"][1:])

    def values(name: str, heads: int = 0) -> Tensor:
        tensor = weights[name + ".weight"]

        def make() -> np.ndarray:
            found = tensor.float().numpy()
            if not heads:
                return found
            # llama.cpp turns neighbouring pairs of a head, transformers its two halves.
            rows = found.reshape(heads, 2, found.shape[0] // heads // 2, found.shape[1])
            return rows.swapaxes(1, 2).reshape(found.shape)

        return tuple(tensor.shape), make

    tensors = {"token_embd.weight": values("model.embed_tokens"), "output_norm.weight": values("model.norm")}
    tensors["output.weight"] = values("lm_head")
    turned = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i in range(config.num_hidden_layers):
        for ours, theirs in _DRAFT.items():
            tensors[f"blk.{i}.{theirs}.weight"] = values(f"model.layers.{i}.{ours}", turned.get(theirs, 0))
    _write(out, fields, tensors, "q8_0")


def write_random(out: Path, kind: str, shape: Shape, seed: int = 0) -> None:
    """Write a Llama of random weights, without a tokenizer."""
    value, key, wide = library().GGUFValueType, "llama.", shape.hidden // shape.heads * shape.groups
    whole = {
        "vocab_size": shape.vocabulary, "block_count": shape.layers, "context_length": shape.context,
        "embedding_length": shape.hidden, "feed_forward_length": shape.intermediate,
        "attention.head_count": shape.heads, "attention.head_count_kv": shape.groups,
        "rope.dimension_count": shape.hidden // shape.heads,
    }  # fmt: skip
    fields: dict[str, Any] = {key + name: (number, value.UINT32, None) for name, number in whole.items()}
    fields[key + "attention.layer_norm_rms_epsilon"] = (1e-5, value.FLOAT32, None)
    fields[key + "rope.freq_base"] = (10000.0, value.FLOAT32, None)
    fields["tokenizer.ggml.model"] = ("none", value.STRING, None)
    rng = np.random.default_rng(seed)

    def values(*size: int) -> Tensor:
        if len(size) == 1:
            return size, lambda: np.ones(size, np.float32)
        return size, lambda: rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)

    hidden, inner = shape.hidden, shape.intermediate
    layer = {
        "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (wide, hidden), "attn_v": (wide, hidden),
        "attn_output": (hidden, hidden), "ffn_norm": (hidden,), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }  # fmt: skip
    tensors = {"token_embd.weight": values(shape.vocabulary, hidden), "output_norm.weight": values(hidden)}
    tensors["output.weight"] = values(shape.vocabulary, hidden)
    for i in range(shape.layers):
        tensors |= {f"blk.{i}.{name}.weight": values(*size) for name, size in layer.items()}
    _write(out, fields, tensors, kind)


def _fields(reader: Any) -> dict[str, Any]:
    """Return a file's keys: value, type, and type of what a list holds."""
    return {
        name: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type")
    }


def _write(out: Path, fields: dict[str, Any], tensors: dict[str, Tensor], kind: str) -> None:
    """Write a Llama's file, its matrices at a type."""
    gguf = library()
    writer, types = gguf.GGUFWriter(out, "llama"), gguf.GGMLQuantizationType
    for name, (value, of, inner) in fields.items():
        writer.add_key_value(name, value, of, sub_type=inner)
    chosen = {name: types[kind.upper()] if len(shape) > 1 else types.F32 for name, (shape, _) in tensors.items()}
    for name, (shape, _) in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[chosen[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, chosen[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, make) in tensors.items():
        writer.write_tensor_data(gguf.quants.quantize(make(), chosen[name]))
    writer.close()
