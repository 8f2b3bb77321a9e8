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
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from speckv_online.cpu_engine.batched_forward import batch_of
from speckv_online.cpu_engine.kernels.int8_blocks import lanes, lay_out
from speckv_online.cpu_engine.kernels.llvm import double
from speckv_online.cpu_engine.kernels.team import TEAM
from speckv_online.cpu_engine.llama_program import UNUSABLE, LlamaProgram, Step, plain
from speckv_online.cpu_engine.notes import describe
from speckv_online.modeling.engine import EngineStatus
from speckv_online.modeling.forward_backend import BatchReader
from speckv_online.modeling.kv_cache import KVCache

#: Most tokens that are read at once.
_ROWS = 60
_KERNELS = ("embed", "norm", "linear", "turn", "attend_i8", "gate_i8", "signals")
#: Largest error of the logits, relative to their spread, that passes for rounding to 8 bits. With the shipped draft it
#: is 0.024 to 0.043. It can only make drafts worse: what is decoded is the target's.
_TOLERANCE = 0.1


class Int8Draft:
    """The forward of a Llama draft over a :class:`~speckv_online.modeling.kv_cache.KVCache`; made by
    :func:`compile_forward`.

    It is a :class:`~speckv_online.modeling.forward_backend.ForwardBackend`.

    Parameters
    ----------
    model : LlamaForCausalLM
        In fp32 on the CPU. Its embedding is shared, all other weights are copied: where they change, make it anew.
    width : int
        Floats in a register of the processor, as :func:`speckv_online.cpu_engine.kernels.int8_blocks.lanes` has them.
    kept : sequence of Tensor, optional
        The attribute ``weights`` of another one of the same model. No weight of the model is then read.

    Attributes
    ----------
    weights : list of Tensor
        The weights in 8 bits and their scales, in the order of the program.
    """

    def __init__(self, model: LlamaForCausalLM, width: int, kept: Sequence[torch.Tensor] | None = None) -> None:
        self.model, self.status = model, EngineStatus(True, "8-bit form, one compiled program")
        self.program = p = LlamaProgram(model, width, _ROWS, _KERNELS)
        self.layers, form, body = p.layers, p.form, model.model
        self.weights: list[torch.Tensor] = []  # what the steps point at
        self._kept = None if kept is None else iter(kept)
        self._numbers = form.inputs(_ROWS, max(p.hidden, form.heads * form.size, p.inner))
        state, y, numbers = (t.data_ptr() for t in (p.state, p.y, self._numbers))
        norm = p.kernels["norm"], state, numbers, double(float(model.config.rms_norm_eps)), 0, p.hidden
        steps: list[Step] = []
        for i, layer in enumerate(body.layers):
            a, f = layer.self_attn, layer.mlp
            before, between = layer.input_layernorm, layer.post_attention_layernorm
            steps += [
                norm, self._times(y, before, (a.q_proj, form.size**-0.5), (a.k_proj, 1.0), (a.v_proj, 1.0)),
                *p.attention(i, "i8", numbers, double(1.0)), self._times(state, None, (a.o_proj, 1.0), add=1),
                norm, self._times(y, between, (f.gate_proj, 1.0), (f.up_proj, 1.0)),
                (p.kernels["gate_i8"], y, numbers, p.inner, 0), self._times(state, None, (f.down_proj, 1.0), add=1),
            ]  # fmt: skip
        p.finish(steps, [norm, self._times(0, body.norm, (model.lm_head, 1.0))], len(model.lm_head.weight))
        self._draft_signals, self._seen, self._lock = p.kernels["signals"], np.empty(5, dtype=np.float32), Lock()
        self._scratch = torch.empty(3, form.lanes)
        self._to = self._seen.ctypes.data, self._scratch.data_ptr()

    def _times(self, out: int, norm: Any, *layers: tuple[Any, float], add: int = 0) -> Step:
        """Return the step that multiplies by the weights of layers, each times a number, behind a norm."""
        outputs, inputs = sum(layer.out_features for layer, _ in layers), layers[0][0].in_features
        if self._kept is not None:
            numbers, scales = next(self._kept), next(self._kept)
        else:
            weight = torch.cat([layer.weight if factor == 1.0 else layer.weight * factor for layer, factor in layers])
            weight = weight if norm is None else weight * norm.weight
            numbers, scales = lay_out(weight.detach().float(), self.program.form.lanes)
        self.weights += [numbers, scales]
        there = self._numbers.data_ptr(), numbers.data_ptr(), out
        return self.program.kernels["linear"], *there, 0, inputs, outputs, scales.data_ptr(), add

    def read(self, ids: Sequence[int], cache: KVCache) -> torch.Tensor:
        """Read tokens into the cache; return the next one's logits, shape (rows of the head,), fp32.

        Errors are those of :meth:`speckv_online.cpu_engine.llama_program.LlamaProgram.read`.
        """
        return self.program.read(ids, cache, 1)[0]

    def forward(
        self, tokens: Sequence[int], cache: KVCache, keep: int, more: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        return self.program.read(tokens if more is None else [*tokens, *more.tolist()], cache, keep)

    @property
    def threads(self) -> int:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        return TEAM.now

    def begin(self) -> None:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""

    def batch(self, prompts: list[list[int]], capacity: int, last_id: int | None = None) -> BatchReader:
        """See :class:`~speckv_online.modeling.forward_backend.ForwardBackend`."""
        return batch_of(self.model, prompts, capacity, self.program, last_id)

    def draft_signals(self, logits: torch.Tensor) -> tuple[int, float, float, float, float]:
        """Return what :func:`speckv_online.drafters.draft_signals` finds in what :meth:`read` returned."""
        with self._lock:
            self._draft_signals(logits.data_ptr(), *self._to, len(logits))
            first, second, row, total, weighed = self._seen.tolist()
        if not total > 0.0 or weighed != weighed:
            return 0, math.nan, math.nan, math.nan, math.nan
        return int(row), first, second, max(math.log(total) - weighed / total, 0.0), 1.0 / total


def compile_forward(model: PreTrainedModel) -> Int8Draft | None:
    """Return the quick form of a draft, or None where there is none or it would not pay.

    It takes a plain Llama (default rotary embedding, no biases) in fp32 on a CPU that there are kernels for. Where they
    cannot be compiled, or the answer is not the model's up to rounding, there is no quick form.
    """
    return int8_form(model)[0]


@torch.inference_mode()
def int8_form(model: PreTrainedModel, kept: Sequence[torch.Tensor] | None = None) -> tuple[Int8Draft | None, str]:
    """Do what :func:`compile_forward` does, and say why there is no quick form. One with ``kept`` weights was right."""
    width = lanes()
    if width is None:
        return None, "no kernels for this processor, or no llvmlite"
    if not plain(model):
        return None, f"{type(model).__name__} is no plain Llama on a CPU"
    linear = {type(m) for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    floats = (p for name, p in model.named_parameters() if not name.endswith("embed_tokens.weight"))
    if any(p.dtype != torch.float32 for p in floats) or not all(issubclass(k, nn.Linear) for k in linear):
        return None, "its weights are not in fp32"
    ids = torch.arange(1, 32) % len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    try:
        compiled = Int8Draft(model, width, kept)
        if kept is not None:
            return compiled, ""
        found = compiled.read(ids.tolist(), KVCache(compiled.layers, 4))
    except UNUSABLE as error:
        return None, describe(error)
    expected = model(input_ids=ids[None], logits_to_keep=1).logits[0, -1]
    off = float((found - expected).std() / expected.std())
    if not off <= _TOLERANCE:
        return None, f"its logits are off by {off:.3g} of their standard deviation, {_TOLERANCE:g} is allowed"
    return compiled, ""
