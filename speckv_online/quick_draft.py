"""A Llama draft for one sequence on a CPU: 8-bit weights, one call, and the same answer at every width.

On a CPU one token of a small draft takes as long as its weights take to be read, and as the calls of its forward take
to be made. Here weights and the inputs of matrices are rounded to 8 bits as in GGUF's Q8_0, layers that read the same
input are one matrix, norms' weights are folded into the matrices behind them, and the whole forward is one call of
compiled kernels. Nothing of that can change what is decoded, only how often a draft is right (docs/draft.md).

What a token's logits are depends on the tokens before it alone, to the last bit, however many of them are read in one
forward: each kernel treats a row in the same way at any width. An exact trace is therefore what the decoder drafts,
whenever it does.
"""

from __future__ import annotations

import math
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from speckv_online.jit import Program, double
from speckv_online.kernels_llama import BLOCK, Form, check_ids, compiled, lanes, lay_out
from speckv_online.kvcache import KVCache

#: Most tokens that are read at once.
_ROWS = 60
#: Largest error of the logits, relative to their spread, that passes for rounding to 8 bits.
_TOLERANCE = 0.1


class _Matrix(NamedTuple):
    """A weight in 8 bits with its scales."""

    outputs: int
    inputs: int
    numbers: torch.Tensor
    scales: torch.Tensor


class _Buffers:
    """What a forward writes, for at most :data:`_ROWS` rows."""

    def __init__(self, form: Form, hidden: int, inner: int) -> None:
        widest, together = max(hidden, form.heads * form.size, inner), (form.heads + 2 * form.groups) * form.size
        self.state, self.y = torch.empty(_ROWS, hidden), torch.empty(_ROWS, max(together, 2 * inner))
        self.numbers = form.inputs(_ROWS, widest)
        self.scratch, self.seen = torch.empty(0), np.empty(5, dtype=np.float32)


class QuickDraft:
    """The forward of a Llama draft over a :class:`~speckv_online.kvcache.KVCache`; made by :func:`quicken`.

    Parameters
    ----------
    model : LlamaForCausalLM
        In fp32 on the CPU. Its embedding is shared, all other weights are copied.
    width : int
        Floats in a register of the processor, as :func:`speckv_online.kernels_llama.lanes` has them.
    """

    def __init__(self, model: LlamaForCausalLM, width: int) -> None:
        config, body = model.config, model.model
        heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads or 0)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.form, self.eps = Form(width, heads, groups, size), float(config.rms_norm_eps)
        self.hidden, self.inner = int(config.hidden_size), int(config.intermediate_size)
        if self.hidden % BLOCK or self.inner % BLOCK or size % BLOCK or size % (2 * width):
            raise ValueError("sizes that the kernels do not take")
        self.embedding = body.embed_tokens.weight.detach()
        self.layers = []
        for layer in body.layers:
            a, f = layer.self_attn, layer.mlp
            together = torch.cat((a.q_proj.weight * size**-0.5, a.k_proj.weight, a.v_proj.weight))
            gated = torch.cat((f.gate_proj.weight, f.up_proj.weight))
            weights = (
                together * layer.input_layernorm.weight, a.o_proj.weight,
                gated * layer.post_attention_layernorm.weight, f.down_proj.weight,
            )  # fmt: skip
            self.layers.append([self._matrix(weight) for weight in weights])
        self.head = self._matrix(model.lm_head.weight * body.norm.weight)
        angles = torch.arange(config.max_position_embeddings)[:, None] * body.rotary_emb.inv_freq.float()
        self.turns = torch.stack((angles.cos(), angles.sin()), 1).contiguous()
        self._lock = Lock()
        with torch.inference_mode(False):
            self._buffers = _Buffers(self.form, self.hidden, self.inner)
        self._program()

    def _matrix(self, weight: torch.Tensor) -> _Matrix:
        outputs, inputs = weight.shape
        return _Matrix(outputs, inputs, *lay_out(weight.detach().float(), self.form.lanes))

    def _program(self) -> None:
        """Write down the forward's steps; what changes from call to call is filled in by :meth:`_forward`."""
        b, eps, one, kernels = self._buffers, double(self.eps), double(1.0), compiled(self.form)
        state, y, numbers = (t.data_ptr() for t in (b.state, b.y, b.numbers))

        def times(matrix: _Matrix, out: int, add: int = 0) -> tuple[Any, ...]:
            return (
                kernels["linear"],
                numbers,
                matrix.numbers.data_ptr(),
                out,
                0,
                matrix.inputs,
                matrix.outputs,
                matrix.scales.data_ptr(),
                add,
            )

        norm, steps = (kernels["norm"], state, numbers, eps, 0, self.hidden), list[tuple[Any, ...]]()
        for together, out, gated, down in self.layers:
            steps += [
                norm, times(together, y), (kernels["turn"], y, self.turns.data_ptr(), 0, 0, 0, 0, 0),
                (kernels["attend_i8"], y, 0, 0, 0, 0, 0, numbers, 0, one), times(out, state, 1),
                norm, times(gated, y), (kernels["gate_i8"], y, numbers, self.inner, 0), times(down, state, 1),
            ]  # fmt: skip
        last = [norm, times(self.head, 0)]
        steps = [(kernels["embed"], 0, self.embedding.data_ptr(), state, 0, self.hidden), *steps, *last]
        self._steps = Program(steps)
        self._arguments = self._steps.arguments
        self._turns, self._attends = self._arguments[3:-2:9], self._arguments[4:-2:9]
        self._arguments[-2:, 3] = 1
        self._look = kernels["look"]
        self._seen = b.seen.ctypes.data, b.y.data_ptr()

    def read(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read tokens into the cache; return the next one's logits.

        Parameters
        ----------
        ids : Tensor of int, shape (n,)
        cache : KVCache

        Returns
        -------
        Tensor, shape (rows of the head,), fp32
        """
        if not len(ids):
            raise ValueError("there is no token to read")
        if len(cache) + len(ids) > len(self.turns):
            raise ValueError(f"the draft holds only {len(self.turns)} tokens")
        check_ids(ids, len(self.embedding))
        logits, ids = torch.empty(self.head.outputs), ids.contiguous()
        with self._lock:
            self._arguments[-1, 2] = logits.data_ptr()
            for at in range(0, len(ids), _ROWS):
                self._forward(ids[at : at + _ROWS], cache, None if at + _ROWS >= len(ids) else -2)
        return logits

    def look(self, logits: torch.Tensor) -> tuple[int, float, float, float, float]:
        """Return what :func:`speckv_online.drafters.look` does."""
        with self._lock:
            self._look(logits.data_ptr(), *self._seen, len(logits))
            first, second, row, total, weighed = self._buffers.seen.tolist()
        if not total > 0.0 or weighed != weighed:
            return 0, math.nan, math.nan, math.nan, math.nan
        return int(row), first, second, max(math.log(total) - weighed / total, 0.0), 1.0 / total

    def _forward(self, ids: torch.Tensor, cache: KVCache, last: int | None) -> None:
        """Read at most :data:`_ROWS` tokens, without the head if ``last`` is -2."""
        count, start, b, arguments = len(ids), len(cache), self._buffers, self._arguments
        places = [
            (keys.data_ptr(), values.data_ptr(), keys.shape[2])
            for keys, values in cache.claim(count, self.form.groups, self.form.size)
        ]
        capacity = places[0][2]
        needed = torch.get_num_threads() * (self.form.heads // self.form.groups) * (capacity + 16)
        if len(b.scratch) < needed:
            b.scratch = torch.empty(needed)
        scratch = b.scratch.data_ptr()
        arguments[:-2, 3] = count
        arguments[0, 0] = ids.data_ptr()
        arguments[-2, 0] = b.state.data_ptr() + 4 * self.hidden * (count - 1)
        for turn, attend, (keys, values, _) in zip(self._turns, self._attends, places, strict=True):
            turn[2], turn[4], turn[5], turn[6] = keys, values, start, capacity
            attend[1], attend[2], attend[4], attend[5], attend[7] = keys, values, start, capacity, scratch
        self._steps.run(0, last)


@torch.inference_mode()
def quicken(model: PreTrainedModel) -> QuickDraft | None:
    """Return the quick form of a draft, or None where there is none or it would not pay.

    It takes a plain Llama (default rotary embedding, no biases) in fp32 on a CPU that
    :mod:`speckv_online.kernels_llama` has kernels for. Where they cannot be compiled, or the answer is not the model's
    up to rounding, there is no quick form.
    """
    config, width = model.config, lanes()
    if type(model) is not LlamaForCausalLM or width is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    linear = {type(m) for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    plain = rope.get("rope_type", "default") == "default" and config.hidden_act == "silu"
    if not plain or any(name.endswith("bias") for name, _ in model.named_parameters()):
        return None
    weights = [p for p in model.parameters() if p.device.type != "cpu" or p.dtype != torch.float32]
    if weights or not all(issubclass(kind, torch.nn.Linear) for kind in linear):
        return None
    ids = torch.arange(1, 32) % len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    try:
        quick = QuickDraft(model, width)
        found = quick.read(ids, KVCache(len(quick.layers), 4))
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError):  # no llvmlite, another torch, odd sizes
        return None
    expected = model(input_ids=ids[None], logits_to_keep=1).logits[0, -1]
    return quick if bool((found - expected).std() <= _TOLERANCE * expected.std()) else None
