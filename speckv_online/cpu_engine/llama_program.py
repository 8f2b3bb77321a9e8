"""A Llama's forward as one program of compiled kernels, over a cache of ours: what a draft's and a target's share.

On a CPU half the time of a forward of a small model goes into what is not its matrices: hundreds of operations that are
asked for one by one and do little each. As one :class:`~speckv_online.cpu_engine.kernels.llvm.Program` it is one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM

from speckv_online.cpu_engine.kernels.int8_blocks import BLOCK, Form
from speckv_online.cpu_engine.kernels.llama import compiled
from speckv_online.cpu_engine.kernels.llvm import Program
from speckv_online.modeling.kv_cache import KVCache

#: A kernel and its arguments.
Step = tuple[Any, ...]
#: What may go wrong where kernels are made: no llvmlite, another version of a library, layers of other kinds or sizes.
UNUSABLE = (AttributeError, ImportError, KeyError, OSError, RuntimeError, ValueError)


#: Where the modules of a plain model come from: what others put in place may do anything.
_SOURCES = {"torch", "transformers", "bitsandbytes", "speckv_online"}


def plain(model: nn.Module) -> TypeGuard[LlamaForCausalLM]:
    """Return True for a Llama on the CPU with the default rotary embedding and no biases, ready for inference."""
    if type(model) is not LlamaForCausalLM or model.training or model.config.hidden_act != "silu":
        return False
    if any(type(m).__module__.partition(".")[0] not in _SOURCES for m in model.modules()):
        return False
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    if rope.get("rope_type", "default") != "default":
        return False
    return all(p.device.type == "cpu" and not name.endswith("bias") for name, p in model.named_parameters())


class LlamaProgram:
    """The forward of a Llama; its steps are given to :meth:`finish`.

    Parameters
    ----------
    model : LlamaForCausalLM
        Its embedding is in fp32, or has a kernel of its own.
    width : int
        Floats in a register of the processor, as :func:`speckv_online.cpu_engine.kernels.int8_blocks.lanes` has them.
    rows : int
        Most tokens that are read at once.
    names : tuple of str
        Its kernels in :mod:`speckv_online.cpu_engine.kernels.llama`.

    Raises
    ------
    ValueError
        If the kernels do not take its sizes or types.
    """

    def __init__(self, model: LlamaForCausalLM, width: int, rows: int, names: tuple[str, ...]) -> None:
        config, body = model.config, model.model
        heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads or config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.form = Form(width, heads, groups, size)
        self.hidden, self.inner = int(config.hidden_size), int(config.intermediate_size)
        self.embedding = body.embed_tokens.weight.detach()
        own = getattr(body.embed_tokens, "kernel", None)  # reads rows that are not in fp32
        usable = (own is not None or self.embedding.dtype == torch.float32) and self.embedding.is_contiguous()
        if not usable or self.hidden % BLOCK or self.inner % BLOCK or size % BLOCK or size % (2 * width):
            raise ValueError("sizes or types that the kernels do not take")
        self.kernels, self.rows, self.layers = compiled(self.form, names), rows, len(body.layers)
        self._embed = own or self.kernels["embed"]
        angles = torch.arange(config.max_position_embeddings)[:, None] * body.rotary_emb.inv_freq.float()
        #: Cosines and sines of each position.
        self.turns = torch.stack((angles.cos(), angles.sin()), 1).contiguous()
        #: Of each row what goes from layer to layer, and the outputs of a layer's first matrices.
        self.state = torch.empty(rows, self.hidden)
        self._states, self._tokens = self.state.data_ptr(), len(self.embedding)
        #: Most tokens of a text.
        self.most = len(self.turns)
        self.y = torch.empty(rows, max((heads + 2 * groups) * size, 2 * self.inner))
        #: Of each row its position and its cache's capacity; in each layer the addresses of its keys and values.
        self._places, self._addresses = np.zeros((rows, 2), np.int64), np.zeros((self.layers, 2, rows), np.int64)
        # The addresses that all rows have, those of read's latest cache; the tokens; what the steps know of numbers.
        self._filled: np.ndarray | None = None
        self._ids = np.zeros(rows, np.int64)
        self._longest, self._counts = 0, (0, 0)
        self._scratch, self._attending, self._lock = torch.empty(0), list[Step](), Lock()

    def attention(self, layer: int, to: str, out: int, scale: int) -> list[Step]:
        """Return the steps from queries, keys and values in :attr:`y` to answers of a type; a double's bits scale."""
        y, places = self.y.data_ptr(), self._places.ctypes.data
        keys, values = (row.ctypes.data for row in self._addresses[layer])
        turn = self.kernels["turn"], y, self.turns.data_ptr(), keys, 0, values, places
        attend = self.kernels[f"attend_{to}"], y, keys, values, 0, places, 0, out, 0, scale
        self._attending.append(attend)
        return [turn, attend]

    def finish(self, steps: list[Step], last: list[Step], outputs: int) -> None:
        """Take the steps of all layers, from :attr:`state` to :attr:`state`, and those from one state to the logits.

        The first of ``last`` has the state as its first argument, the last one the logits as its third.
        """
        first = self._embed, 0, self.embedding.data_ptr(), self.state.data_ptr(), 0, self.hidden
        self._steps, self._outputs = Program([first, *steps, *last]), outputs
        self._body, self._last = self._steps.arguments[: -len(last)], self._steps.arguments[-len(last) :]
        self._body[0, 0] = self._ids.ctypes.data
        self._attends = [1 + i for i, step in enumerate(steps) if any(step is own for own in self._attending)]

    def read(self, ids: Sequence[int], cache: KVCache, keep: int) -> torch.Tensor:
        """Read tokens into the cache; return the logits behind the last ``keep`` of them.

        Parameters
        ----------
        ids : sequence of int
        cache : KVCache
        keep : int
            At least 1, at most as many as there are tokens.

        Returns
        -------
        Tensor, shape (keep, rows of the head), fp32

        Raises
        ------
        IndexError
            If a token is none of the model's.
        ValueError
            If there is no token to read, or no room for it in the model's context.
        """
        count, start = len(ids), len(cache)
        if count > self.rows:
            return self.read_all([ids], [cache], keep)
        self._check(ids, start + count)
        logits = torch.empty(keep, self._outputs)
        with self._lock:
            self._place(ids, cache)
            self._run(count, range(count - keep, count), logits)
        return logits

    def trace(self, ids: Sequence[int], ends: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a text, at most :attr:`rows` tokens; return what the rows' states are after some of the steps.

        Parameters
        ----------
        ids : sequence of int
        ends : sequence of int
            How many steps are done by then, the embedding counted; the last one is all but those of ``last``.

        Returns
        -------
        states : Tensor, shape (ends, tokens, hidden)
        logits : Tensor, shape (tokens, rows of the head)
        """
        count, at, states = len(ids), 0, list[torch.Tensor]()
        self._check(ids, count)
        cache, logits = KVCache(self.layers, count), torch.empty(count, self._outputs)
        with self._lock:
            self._place(ids, cache)
            self._body[:, 3], self._last[:, 3], self._counts = count, count, (count, count)
            self._last[0, 0], self._last[-1, 2] = self._states, logits.data_ptr()
            for end in ends:
                self._steps.run(at, end)
                states.append(self.state[:count].clone())
                at = end
            self._steps.run(at)
        return torch.stack(states), logits

    def _place(self, ids: Sequence[int], cache: KVCache) -> None:
        """Set tokens, their places, and where the cache's keys and values are."""
        count, start = len(ids), len(cache)
        addresses, capacity = cache.claim(count, self.form.groups, self.form.size)
        self._make_room(start + count)
        if self._filled is not addresses:
            self._addresses[:], self._filled = addresses[:, :, None], addresses
        places = self._places
        places[:count, 0], places[:count, 1] = range(start, start + count), capacity
        self._ids[:count] = ids

    def _check(self, ids: Sequence[int], longest: int) -> None:
        """Refuse tokens that are none of the model's, and texts that it cannot hold: kernels do not look."""
        if not ids:
            raise ValueError("there is no token to read")
        if min(ids) < 0 or max(ids) >= self._tokens:
            raise IndexError(f"token ids from {min(ids)} to {max(ids)}, the model has {self._tokens}")
        if longest > self.most:
            raise ValueError(f"the model holds only {self.most} tokens")

    def read_all(self, ids: Sequence[Sequence[int]], caches: Sequence[KVCache], keep: int) -> torch.Tensor:
        """Read tokens of several sequences, each into its own cache.

        Parameters
        ----------
        ids : sequence of sequence of int
            Of each sequence any number of tokens.
        caches : sequence of KVCache
        keep : int
            Of how many tokens of each sequence the logits are wanted, the last ones; all if it has fewer.

        Returns
        -------
        Tensor, shape (all wanted tokens, rows of the head), fp32
            Sequence by sequence. Errors are those of :meth:`read`.
        """
        flat = [token for some in ids for token in some]
        self._check(flat, max(len(cache) + len(some) for cache, some in zip(caches, ids, strict=True)))
        places, addresses = np.empty((len(flat), 2), np.int64), np.empty((self.layers, 2, len(flat)), np.int64)
        wanted, at = list[int](), 0
        for some, cache in zip(ids, caches, strict=True):
            if some:
                start, end = len(cache), at + len(some)
                where, capacity = cache.claim(len(some), self.form.groups, self.form.size)
                places[at:end, 0], places[at:end, 1] = range(start, start + len(some)), capacity
                addresses[:, :, at:end] = where[:, :, None]
                wanted += range(max(end - keep, at), end)
                at = end
        logits, done = torch.empty(len(wanted), self._outputs), 0
        with self._lock:
            self._make_room(int(places[:, 0].max()) + 1)
            self._filled = None
            for at in range(0, len(flat), self.rows):
                end = min(at + self.rows, len(flat))
                here = [row - at for row in wanted if at <= row < end]
                self._places[: end - at], self._addresses[:, :, : end - at] = places[at:end], addresses[:, :, at:end]
                self._ids[: end - at] = flat[at:end]
                self._run(end - at, here, logits[done : done + len(here)])
                done += len(here)
        return logits

    def _make_room(self, longest: int) -> None:
        """Have room for the scores of so many positions."""
        longest = -(-longest // 16) * 16
        needed = torch.get_num_threads() * (self.form.heads // self.form.groups) * longest
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(2 * needed)
            self._body[self._attends, 7] = self._scratch.data_ptr()
        if longest != self._longest:
            self._body[self._attends, 5] = self._longest = longest

    def _run(self, count: int, wanted: Sequence[int], logits: torch.Tensor) -> None:
        """Read a piece, whose tokens and places are set, and write the logits behind some of the tokens."""
        keep = len(wanted)
        if self._counts != (count, keep):
            self._body[:, 3], self._last[:, 3], self._counts = count, keep, (count, keep)
        if not keep:
            self._steps.run(0, len(self._body))
            return
        self._last[-1, 2] = logits.data_ptr()
        if wanted[0] == count - keep:
            self._last[0, 0] = self._states + 4 * self.hidden * (count - keep)
            self._steps.run()
            return
        self._steps.run(0, len(self._body))
        picked = self.state[list(wanted)]
        self._last[0, 0] = picked.data_ptr()
        self._steps.run(len(self._body))
