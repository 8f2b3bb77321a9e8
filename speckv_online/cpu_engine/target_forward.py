"""The forward of a Llama target over some tokens in one call, on a CPU.

It is a :mod:`speckv_online.cpu_engine.llama_program` on the matrices of :mod:`speckv_online.cpu_engine.pack` and
:mod:`speckv_online.cpu_engine.bnb_layers`. Logits are the model's up to rounding. All kernels treat a row in the same
way at any width, so a verification gives a token the same bits as a forward of that token alone. At int8 that is more
than bitsandbytes does: there, an outlier in one row moves its column out of the whole numbers in all rows of a forward.
So the model itself reads prompts at int8, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from speckv_online.cpu_engine.gguf_layers import GgufProduct, input_types
from speckv_online.cpu_engine.kernels import gguf_blocks as kernels_gguf
from speckv_online.cpu_engine.kernels import rms_norm as norms
from speckv_online.cpu_engine.kernels.int8_blocks import lanes
from speckv_online.cpu_engine.kernels.llvm import double
from speckv_online.cpu_engine.layer_patches import OVERRIDES, stock_layers
from speckv_online.cpu_engine.llama_program import UNUSABLE, LlamaProgram, Step, plain
from speckv_online.cpu_engine.logit_check import what_is_wrong
from speckv_online.cpu_engine.notes import describe, notes_of
from speckv_online.cpu_engine.products import Int8, together
from speckv_online.cpu_engine.verdicts import Verdicts
from speckv_online.cpu_engine.weight_version import state_of
from speckv_online.modeling.fingerprint import remember_fingerprint
from speckv_online.modeling.kv_cache import KVCache

#: Most tokens that are read at once; for more than so many pieces the model itself is the quicker one.
MOST_ROWS, MOST_PIECES = 64, 4
#: Most bytes of bitsandbytes' weights that are kept twice.
MOST_BYTES = 2 << 30
#: Arguments of a forward that it knows.
_KNOWN = {"input_ids", "past_key_values", "use_cache", "logits_to_keep"}


class _Room:
    """Where inputs are rounded: to 8 bits, numbers, largest elements, outliers; to 16 bits."""

    def __init__(self, widest: int) -> None:
        self._tensors = (
            torch.empty(MOST_ROWS, widest, dtype=torch.uint8),
            torch.empty(MOST_ROWS),
            torch.empty(MOST_ROWS, widest + 1, dtype=torch.int32),
        )
        self.blocks = kernels_gguf.inputs_for(MOST_ROWS, widest)
        self.pointers = [t.data_ptr() for t in self._tensors]


class CompiledTarget:
    """The forward of a Llama over a :class:`~speckv_online.modeling.kv_cache.KVCache`; made by :func:`compile_forward`.

    Parameters
    ----------
    model : LlamaForCausalLM
        On the CPU, with an embedding and norms in fp32; its linear layers have run twice.
    width : int
        Floats in a register of the processor, as :func:`speckv_online.cpu_engine.kernels.int8_blocks.lanes` has them.
    """

    def __init__(self, model: LlamaForCausalLM, width: int) -> None:
        given = (f"{name}_{to}" for to in input_types(model) for name in ("attend", "gate"))
        names = "embed", "turn", "add", "shorten", *given
        self.program = p = LlamaProgram(model, width, MOST_ROWS, names)
        #: Whether somebody changes what the model's modules do, which the program does not see.
        self.watched = False
        #: Whether the model was looked at for the text that begins next.
        self.looked = False
        body, scale = model.model, double(float(model.model.layers[0].self_attn.scaling))
        widest = max(p.hidden, p.form.heads * p.form.size, p.inner)
        self._x, self._more, room = torch.empty(MOST_ROWS, widest), torch.empty(MOST_ROWS, p.hidden), _Room(widest)
        self._kept: list[Any] = [room]  # what the steps point at
        state, x, y, more = (t.data_ptr() for t in (p.state, self._x, p.y, self._more))
        #: Where inputs of each type are.
        self._at, steps = {"float": x, "bfloat": x} | dict.fromkeys(("b8", "b16"), room.blocks.data_ptr()), list[Step]()

        def added(product: Any) -> list[Step]:
            if isinstance(product, GgufProduct) and product.to != "float":
                return product.steps(self._at[product.to], state, room, add=1)
            return [*product.steps(x, more, room), (p.kernels["add"], state, more, 0, 0, p.hidden)]

        #: Steps of the program before each layer, and before the head.
        self.ends = [1]
        for i, layer in enumerate(body.layers):
            a, f = layer.self_attn, layer.mlp
            joined, out = together(a.q_proj, a.k_proj, a.v_proj), together(a.o_proj)
            gated, down = together(f.gate_proj, f.up_proj), together(f.down_proj)
            self._kept += [out, down]
            steps += [
                *self._normed(layer.input_layernorm, joined), *joined.steps(self._at[joined.to], y, room),
                *p.attention(i, out.to, self._at[out.to], scale), *added(out),
                *self._normed(layer.post_attention_layernorm, gated), *gated.steps(self._at[gated.to], y, room),
                (p.kernels[f"gate_{down.to}"], y, self._at[down.to], p.inner, 0), *added(down),
            ]  # fmt: skip
            self.ends.append(1 + len(steps))
        head = together(model.lm_head)
        p.finish(steps, [*self._normed(body.norm, head), *head.steps(self._at[head.to], 0, room)], head.outputs)
        #: Whether a prompt is better read by the model: what LLM.int8 makes of it depends on all of it at once.
        self.whole_prompts = any(isinstance(kept, Int8) for kept in self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledTarget:
        return self  # the steps point at this one's memory

    def _normed(self, norm: Any, product: Any) -> list[Step]:
        """Return the steps from the state to a norm's answers as a product takes them."""
        p, weight, eps = self.program, norm.weight.detach(), double(float(norm.variance_epsilon))
        if weight.dtype != torch.float32 or not weight.is_contiguous():
            raise ValueError("a norm in another type")
        self._kept += [weight, product]
        state, x = p.state.data_ptr(), self._at[product.to]
        if product.to in ("b8", "b16"):
            kernel = kernels_gguf.compiled(p.form.lanes, f"normed_{product.to}")
            return [(kernel, state, x, weight.data_ptr(), 0, p.hidden, eps)]
        steps: list[Step] = [(norms.compiled(), state, weight.data_ptr(), x, 0, p.hidden, eps)]
        return steps if product.to == "float" else [*steps, (p.kernels["shorten"], x, 0, 0, 0, p.hidden)]

    def room(self, cache: KVCache) -> int:
        """Return how many tokens may be read at once into a cache."""
        return min(MOST_ROWS * MOST_PIECES, self.program.most - len(cache))

    def read(self, ids: Sequence[int], cache: KVCache, keep: int) -> torch.Tensor:
        """Do what :meth:`speckv_online.cpu_engine.llama_program.LlamaProgram.read` does."""
        return self.program.read(ids, cache, keep)


def compiled_of(model: nn.Module) -> CompiledTarget | None:
    """Return a model's quick forward, if it may be used, as of the model now; to be called where a text begins.

    It is made anew where weights or modules were changed. It stands back while there are hooks on the model's modules.
    """
    made_of = model.__dict__.get("_compiled_of")
    if made_of is None:
        return None
    state, watched = state_of(model, OVERRIDES)
    if state != made_of and not watched:  # what hooks do would be taken for the model's own
        compile_forward(model)
    compiled: CompiledTarget | None = model.__dict__.get("_compiled")
    if compiled is None:
        return None
    compiled.watched = watched or _has_any_global_hook()
    return None if compiled.watched else compiled


def look_ahead(model: nn.Module) -> None:
    """Look at a model for the text that begins next, so that its first forward need not."""
    compiled_of(model)
    if (compiled := model.__dict__.get("_compiled")) is not None:
        compiled.looked = True


def compiled_at_beginning(model: nn.Module) -> CompiledTarget | None:
    """Do what :func:`compiled_of` does, at most once a text."""
    compiled: CompiledTarget | None = model.__dict__.get("_compiled")
    if compiled is None or not compiled.looked:
        return compiled_of(model)
    compiled.looked = False
    return None if compiled.watched else compiled


@wraps(LlamaForCausalLM.forward)  # transformers reads the signature
def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's forward: the quick one for some tokens over a cache of ours, else its own."""
    ids, cache, keep = kwargs.get("input_ids"), kwargs.get("past_key_values"), kwargs.get("logits_to_keep", 0)
    known = not args and kwargs.keys() <= _KNOWN and isinstance(keep, int) and not torch.is_grad_enabled()
    if isinstance(cache, KVCache) and cache.at_start:  # a new text
        compiled_at_beginning(model)
    known = known and "_compiled" in model.__dict__ and not model._compiled.watched
    # No layer was taken out since.
    known = known and len(model.model.layers) == model._compiled.program.layers
    if known and isinstance(cache, KVCache) and isinstance(ids, torch.Tensor):
        usable = ids.dim() == 2 and len(ids) == 1 and ids.dtype == torch.int64 and ids.is_cpu
        count, room = ids.shape[-1], model._compiled.room(cache)
        # Of the logits that are wanted those of the prompt's last token are the first: the others are of drafts.
        drafts = keep - 1 if 0 < keep <= count else 0
        if usable and model._compiled.whole_prompts and cache.at_start and count - drafts > 1:
            prompt, rest = ids.split([count - drafts, drafts], 1)
            out = type(model).forward(model, input_ids=prompt, past_key_values=cache, logits_to_keep=keep - drafts)
            if drafts:
                out.logits = torch.cat((out.logits, model(input_ids=rest, past_key_values=cache).logits), 1)
            return out
        if usable and 0 < count <= room:
            logits = model._compiled.read(ids[0].tolist(), cache, min(keep, count) or count)
            return CausalLMOutputWithPast(logits=logits[None], past_key_values=cache)
    return type(model).forward(model, *args, **kwargs)


def try_compiled_forward(model: nn.Module, tokens: Sequence[int], cache: KVCache, keep: int) -> torch.Tensor | None:
    """Read more tokens of a text as a model's forward would, without what is around it in transformers and torch.

    Returns
    -------
    Tensor or None
        As :meth:`CompiledTarget.read`; None where the model has no quick forward, or where somebody wants to know of
        its calls: then call the model. So does the text's beginning, when weights are looked at.
    """
    compiled: CompiledTarget | None = model.__dict__.get("_compiled")
    if (
        compiled is None
        or compiled.watched
        or cache.at_start
        or getattr(model.__dict__.get("forward"), "__func__", None) is not _forward
    ):
        return None
    if model._forward_hooks or model._forward_pre_hooks or _has_any_global_hook() or model._compiled_call_impl:
        return None
    if len(tokens) > compiled.room(cache) or len(model.model.layers) != compiled.program.layers:  # type: ignore[arg-type, union-attr]
        return None
    return compiled.read(tokens, cache, keep)


@torch.inference_mode()
def compile_forward(model: nn.Module, verdicts: Verdicts | None = None, known: bool = False) -> bool:
    """Let a packed model on the CPU read few tokens in one call where it can; return True if it does.

    It takes a plain Llama (default rotary embedding, no biases). Where the kernels cannot be compiled, or the logits
    are not the model's up to rounding (:mod:`speckv_online.cpu_engine.logit_check`), the model stays as it is. The
    reason then stands in the model's notes. A model as it was loaded, found right before, is not compared again:
    ``verdicts`` tell. Nor is one whose layouts were kept, which is ``known``.
    """
    if model.__dict__.pop("_compiled", None) is not None:
        del model.forward
    notes = notes_of(model)
    notes.compiled, compiled = False, None
    model._compiled_of = ()  # type: ignore[assignment]
    width = lanes()
    if width is None:
        reason, failed = "no kernels for this processor, or no llvmlite", True
    elif not plain(model):
        reason, failed = f"{type(model).__name__} is no plain Llama on a CPU", False
    elif sum(weight.nbytes for m in _quantized(model) for weight in m.parameters()) > MOST_BYTES:
        reason, failed = "its weights are too large to be kept twice", False
    else:
        compiled, reason, failed = _checked(model, width, verdicts, known)
    model._compiled_of = state_of(model, OVERRIDES)[0]  # type: ignore[assignment]
    if compiled is None:
        notes.lacks("compiled forward", reason, failed)
        return False
    notes.missing.pop("compiled forward", None)
    notes.compiled, model._compiled = True, compiled  # type: ignore[assignment]
    model.forward = MethodType(_forward, model)
    return True


def _quantized(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]


def _checked(
    model: LlamaForCausalLM, width: int, verdicts: Verdicts | None, known: bool
) -> tuple[CompiledTarget | None, str, bool]:
    """Return a model's quick forward, or why there is none, and whether that is a failure."""
    if verdicts is None and not known:
        remember_fingerprint(model)
    # No special tokens, whose states magnify the rounding of LLM.int8.
    ids = torch.arange(1, 12) * (model.config.vocab_size // 12)
    for _ in range(0 if known else 2):  # layers find their short ways
        model(input_ids=ids[None, :1], past_key_values=KVCache(int(model.config.num_hidden_layers), 4))
    try:
        compiled = CompiledTarget(model, width)
        if known or (verdicts is not None and verdicts.known("compiled forward")):
            return compiled, "", False
        states, logits = compiled.program.trace(ids.tolist(), compiled.ends)
        with stock_layers(model):
            wrong = what_is_wrong(model, ids, states, logits)
    except ValueError as error:  # layers of other kinds or sizes
        return None, str(error), False
    except UNUSABLE as error:
        return None, describe(error), True
    if verdicts is not None and not wrong:
        verdicts.keep("compiled forward")
    return (None, wrong, True) if wrong else (compiled, "", False)
