"""The forward of a Llama target over some tokens in one call, on a CPU.

Half the time of a forward of a small model on a CPU goes into what is not its matrices: hundreds of operations that
are asked for one by one and do little each. Here the whole forward is one program of compiled kernels, on the matrices
of :mod:`speckv_online.packed` and :mod:`speckv_online.bnb_cpu`. Logits are the model's up to rounding. All kernels but
LLM.int8's (which looks for outliers in all rows at once) treat a row in the same way at any width, so a verification
gives a token the same bits as a forward of that token alone.
"""

from __future__ import annotations

from threading import Lock
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from speckv_online import kernels_bnb, norms
from speckv_online.jit import Program, double
from speckv_online.kernels_llama import BLOCK, Form, check_ids, compiled, lanes
from speckv_online.kvcache import KVCache

#: Most tokens that are read at once; for more than so many pieces the model itself is the quicker one.
MOST_ROWS, MOST_PIECES = 64, 4
#: Most bytes of bitsandbytes' weights that are kept twice.
MOST_BYTES = 2 << 30
#: Largest error of the logits, relative to their spread, that passes for rounding: bf16 and 8 bits round a lot.
_TOLERANCE = 0.1
#: Arguments of a forward that it knows.
_KNOWN = {"input_ids", "past_key_values", "use_cache", "logits_to_keep"}

_Step = tuple[Any, ...]


class _Packed:
    """Linear layers of the same input as one, of :class:`~speckv_online.packed.PackedLinear`."""

    to = "float"

    def __init__(self, layers: list[Any]) -> None:
        kernels = {layer._kernel for layer in layers}
        self.kernel, self.inputs = kernels.pop(), layers[0].in_features
        if kernels:
            raise ValueError("weights of several types")
        self.weight, self.scales = (torch.cat(parts) for parts in zip(*(x._packed for x in layers), strict=True))
        self.outputs, at = sum(layer.out_features for layer in layers), 0
        for layer in layers:  # they share the memory
            weight, scales = (len(part) for part in layer._packed)
            start = at * len(self.scales) // len(self.weight)
            layer._packed = self.weight[at : at + weight], self.scales[start : start + scales]
            at += weight

    def steps(self, x: int, out: int) -> list[_Step]:
        """Return the kernels that multiply what is at ``x``."""
        scales = self.scales.data_ptr()
        return [(self.kernel, x, self.weight.data_ptr(), out, 0, self.inputs, self.outputs, scales)]


class _FourBit:
    """Linear layers of the same input as one, of bitsandbytes' ``Linear4bit``."""

    to = "bfloat"

    def __init__(self, layers: list[Any]) -> None:
        weights, scales, codes, sizes, blocks = zip(*(layer._light for layer in layers), strict=True)
        self.inputs, self.outputs, self.block = sizes[0][1], sum(outputs for outputs, _ in sizes), blocks[0]
        if len(set(blocks)) > 1 or any(not torch.equal(code, codes[0]) for code in codes):
            raise ValueError("weights of several types")
        self.weight = torch.cat([weight.reshape(-1) for weight in weights])
        self.scales = torch.cat([s.view(self.inputs // self.block, -1) for s in scales], 1).contiguous()
        self.codes = codes[0]

    def steps(self, x: int, out: int) -> list[_Step]:
        """Return the kernels that multiply what is at ``x``, in fp32 with bf16's values."""
        kernel, pointers = kernels_bnb.compiled()["four_bit"], (self.scales.data_ptr(), self.block)
        there = x, self.weight.data_ptr(), out
        return [(kernel, *there, 0, self.inputs, self.outputs, *pointers, self.codes.data_ptr())]


class _Int8:
    """Linear layers of the same input as one, of bitsandbytes' ``Linear8bitLt``."""

    to = "float"

    def __init__(self, layers: list[Any]) -> None:
        weights, scales, sums, thresholds, sizes = zip(*(layer._light for layer in layers), strict=True)
        self.inputs, self.outputs, self.threshold = sizes[0][1], sum(outputs for outputs, _ in sizes), thresholds[0]
        if len(set(thresholds)) > 1:
            raise ValueError("weights of several types")
        self.weight, self.sizes, self.sums = (torch.cat(parts) for parts in (weights, scales, sums))
        self.numbers = torch.empty(MOST_ROWS, self.inputs, dtype=torch.uint8)
        self.tops, self.marks = torch.empty(MOST_ROWS), torch.empty(self.inputs, dtype=torch.int8)
        self.columns = torch.empty(self.inputs + 1, dtype=torch.int64)

    def steps(self, x: int, out: int) -> list[_Step]:
        """Return the kernels that multiply what is at ``x``."""
        kernels, numbers, tops = kernels_bnb.compiled(), self.numbers.data_ptr(), self.tops.data_ptr()
        weight, sizes, columns = self.weight.data_ptr(), self.sizes.data_ptr(), self.columns.data_ptr()
        shape = 0, self.inputs, self.outputs
        return [
            (kernels["quantize"], x, numbers, tops, 0, self.inputs, self.threshold, self.marks.data_ptr(), columns),
            (kernels["int8"], numbers, weight, out, *shape, tops, sizes, self.sums.data_ptr()),
            (kernels["outliers"], x, columns, out, *shape, weight, sizes),
        ]


_KINDS: dict[str, Any] = {"PackedLinear": _Packed, "Linear4bit": _FourBit, "Linear8bitLt": _Int8}


def _together(*layers: Any) -> Any:
    """Return linear layers of the same input as one."""
    kinds = {type(layer).__name__ for layer in layers}
    if len(kinds) > 1 or any(layer.bias is not None for layer in layers):
        raise ValueError("layers of several kinds, or with a bias")
    return _KINDS[kinds.pop()](list(layers))


class QuickTarget:
    """The forward of a Llama over a :class:`~speckv_online.kvcache.KVCache`; made by :func:`quicken`.

    Parameters
    ----------
    model : LlamaForCausalLM
        On the CPU, with an embedding and norms in fp32; its linear layers have run once.
    width : int
        Floats in a register of the processor, as :func:`speckv_online.kernels_llama.lanes` has them.
    """

    def __init__(self, model: LlamaForCausalLM, width: int) -> None:
        config, body = model.config, model.model
        heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads or 0)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.form, self.hidden = Form(width, heads, groups, size), int(config.hidden_size)
        inner, self.vocabulary = int(config.intermediate_size), int(model.lm_head.out_features)
        if self.hidden % BLOCK or inner % BLOCK or size % BLOCK or size % (2 * width):
            raise ValueError("sizes that the kernels do not take")
        angles = torch.arange(config.max_position_embeddings)[:, None] * body.rotary_emb.inv_freq.float()
        self.turns = torch.stack((angles.cos(), angles.sin()), 1).contiguous()
        widest, both = max(self.hidden, heads * size, inner), (heads + 2 * groups) * size
        self._state, self._x, self._y, self._more = (
            torch.empty(MOST_ROWS, n) for n in (self.hidden, widest, max(both, 2 * inner), self.hidden)
        )
        self._scratch, self._lock = torch.empty(0), Lock()
        self._keep: list[Any] = []  # what the steps point at
        self._program(model, inner)

    def _program(self, model: LlamaForCausalLM, inner: int) -> None:
        """Write down the forward's steps; what changes from call to call is filled in by :meth:`read`."""
        state, x, y, more = (t.data_ptr() for t in (self._state, self._x, self._y, self._more))
        kernels, body = compiled(self.form, ("float", "bfloat")), model.model
        scale = double(float(body.layers[0].self_attn.scaling))

        def normed(norm: Any, product: Any) -> list[_Step]:
            weight, eps = norm.weight.detach(), double(float(norm.variance_epsilon))
            if weight.dtype != torch.float32 or not weight.is_contiguous():
                raise ValueError("a norm in another type")
            self._keep += [weight, product]
            steps: list[_Step] = [(norms.compiled(), state, weight.data_ptr(), x, 0, self.hidden, eps)]
            return steps if product.to == "float" else [*steps, (kernels["shorten"], x, 0, 0, 0, self.hidden)]

        embedding = body.embed_tokens.weight.detach()
        if embedding.dtype != torch.float32 or not embedding.is_contiguous():
            raise ValueError("an embedding in another type")
        self._keep.append(embedding)
        self._embedded = len(embedding)
        steps: list[_Step] = [(kernels["embed"], 0, embedding.data_ptr(), state, 0, self.hidden)]
        turns, add = list[int](), (kernels["add"], state, more, 0, 0, self.hidden)
        for layer in body.layers:
            a, f = layer.self_attn, layer.mlp
            together, out = _together(a.q_proj, a.k_proj, a.v_proj), _together(a.o_proj)
            gated, down = _together(f.gate_proj, f.up_proj), _together(f.down_proj)
            self._keep += [out, down]
            steps += [*normed(layer.input_layernorm, together), *together.steps(x, y)]
            turns.append(len(steps))
            steps += [
                (kernels["turn"], y, self.turns.data_ptr(), 0, 0, 0, 0, 0),
                (kernels[f"attend_{out.to}"], y, 0, 0, 0, 0, 0, x, 0, scale),
                *out.steps(x, more), add,
                *normed(layer.post_attention_layernorm, gated), *gated.steps(x, y),
                (kernels[f"gate_{down.to}"], y, x, inner, 0), *down.steps(x, more), add,
            ]  # fmt: skip
        head = _together(model.lm_head)
        last = [*normed(body.norm, head), *head.steps(x, 0)]
        self._steps = Program([*steps, *last])
        self._body, self._last = self._steps.arguments[: len(steps)], self._steps.arguments[len(steps) :]
        self._turns, self._attends = self._body[turns], self._body[[at + 1 for at in turns]]
        self._at = turns

    def read(self, ids: torch.Tensor, cache: KVCache, keep: int) -> torch.Tensor:
        """Read tokens into the cache; return the logits behind the last ``keep`` of them.

        Parameters
        ----------
        ids : Tensor of int64, shape (n,)
        cache : KVCache
        keep : int
            At least 1, at most n.

        Returns
        -------
        Tensor, shape (keep, vocabulary), fp32

        Raises
        ------
        IndexError
            If a token is none of the model's.
        """
        check_ids(ids, self._embedded)
        logits, ids = torch.empty(keep, self.vocabulary), ids.contiguous()
        with self._lock:
            for at in range(0, len(ids), MOST_ROWS):
                some = ids[at : at + MOST_ROWS]
                wanted = max(at + len(some) - (len(ids) - keep), 0)  # of the rows of this piece and those before it
                self._read(some, cache, logits[max(wanted - len(some), 0) : wanted])
        return logits

    def _read(self, ids: torch.Tensor, cache: KVCache, logits: torch.Tensor) -> None:
        """Read a piece, and write the logits behind its last tokens, as many as there is room for."""
        count, keep, start, form, body = len(ids), len(logits), len(cache), self.form, self._body
        layers = cache.claim(count, form.groups, form.size)
        capacity = layers[0][0].shape[2]
        needed = torch.get_num_threads() * (form.heads // form.groups) * (capacity + 16)
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed)
        body[:, 3], body[0, 0] = count, ids.data_ptr()
        turns, attends = self._turns, self._attends
        turns[:, 2] = attends[:, 1] = [keys.data_ptr() for keys, _ in layers]
        turns[:, 4] = attends[:, 2] = [values.data_ptr() for _, values in layers]
        turns[:, 3] = attends[:, 3] = count
        turns[:, 5] = attends[:, 4] = start
        turns[:, 6] = attends[:, 5] = capacity
        attends[:, 7] = self._scratch.data_ptr()
        body[self._at], body[[at + 1 for at in self._at]] = turns, attends
        self._last[:, 3] = keep
        self._last[0, 0] = self._state.data_ptr() + 4 * self.hidden * (count - keep)
        self._last[-1, 2] = logits.data_ptr()
        self._steps.run(0, None if keep else len(body))


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's forward: the quick one for some tokens over a cache of ours, else its own."""
    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    if not args and kwargs.keys() <= _KNOWN and isinstance(cache, KVCache) and isinstance(ids, torch.Tensor):
        rows, count = ids.shape
        keep = kwargs.get("logits_to_keep", 0)
        plain = isinstance(keep, int) and ids.dtype == torch.int64 and ids.is_cpu and not torch.is_grad_enabled()
        room = min(MOST_ROWS * MOST_PIECES, len(model._quick.turns) - len(cache))
        if plain and rows == 1 and 0 < count <= room:
            logits = model._quick.read(ids[0], cache, min(keep, count) or count)
            return CausalLMOutputWithPast(logits=logits[None], past_key_values=cache)
    return type(model).forward(model, *args, **kwargs)


@torch.inference_mode()
def quicken(model: nn.Module) -> bool:
    """Let a packed model on the CPU read few tokens in one call where it can; return True if it does.

    It takes a plain Llama (default rotary embedding, no biases). Where the kernels cannot be compiled, or the logits
    are not the model's up to rounding, the model stays as it is.
    """
    width = lanes()
    if type(model) is not LlamaForCausalLM or width is None or model.training:
        return False
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    if rope.get("rope_type", "default") != "default" or model.config.hidden_act != "silu":
        return False
    kept = (m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt"))
    if sum(weight.nbytes for m in kept for weight in m.parameters()) > MOST_BYTES or any(
        p.device.type != "cpu" for p in model.parameters()
    ):
        return False
    # Of the same width, as LLM.int8 depends on it; no special tokens, whose states magnify its rounding.
    ids = torch.arange(1, 12) * (model.config.vocab_size // 12)
    layers = int(model.config.num_hidden_layers)
    for _ in range(2):  # layers take their short ways from their second forward on
        expected = model(input_ids=ids[None], past_key_values=KVCache(layers, 16)).logits[0]
    try:
        quick = QuickTarget(model, width)
        error = quick.read(ids, KVCache(layers, 4), len(ids)) - expected
    # No llvmlite, another version of a library, layers of other kinds, sizes that the kernels do not take.
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, ValueError):
        return False
    if not bool(error.std() <= _TOLERANCE * expected.std()):
        return False
    model._quick = quick  # type: ignore[assignment]
    model.forward = MethodType(_forward, model)
    return True
