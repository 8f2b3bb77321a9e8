"""A Llama that is read through graphs: one launch per forward, recorded at its first use for each width and window.

The mathematics is transformers' own modules, recorded. What a graph cannot do, the model itself does, over the same
cache: prompts, wider reads, texts that outgrow their room, models and layers of other kinds. docs/gpu.md has the rules.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import LlamaForCausalLM, PreTrainedModel

from speckv_online.gpu_engine.graph_capture import GraphCapture, capture_for
from speckv_online.gpu_engine.static_cache import MAX_WIDTH, SHORTEST, Room, StaticKVCache, WindowCache, bucket
from speckv_online.modeling.kv_cache import KVCache

_LOG = logging.getLogger(__name__)
#: Rotary embeddings whose frequencies never change; others ask the device how long the text is.
_ROPES = {"default", "linear", "llama3"}
#: Attention that takes a mask of numbers.
_ATTENTION = {"sdpa", "eager", "speckv_grouped"}
#: Where modules are from that can be recorded: all of a place, or some of it.
_PLACES = ("transformers.models.llama.", "transformers.activations", "torch.nn.modules.")
_LAYERS = {("bitsandbytes.nn.modules", "Linear4bit"), ("speckv_online.cpu_engine.pack", "PackedLinear")}


def why_not(model: nn.Module) -> str:
    """Return why a model cannot be read through graphs; empty if it can.

    bitsandbytes' 8-bit layers cannot: they ask the device for outliers in every forward.
    """
    if type(model) is not LlamaForCausalLM or model.training:
        return "it is no plain Llama in eval mode"
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if (kind := rope.get("rope_type", "default")) not in _ROPES:
        return f"its rotary embedding {kind!r} depends on the length of the text"
    if config._attn_implementation not in _ATTENTION:
        return f"its attention {config._attn_implementation!r} takes no mask of numbers"
    if len({p.device for p in model.parameters()}) > 1:
        return "its weights are on several devices"
    floats = {m.weight.dtype for m in (model.model.embed_tokens, model.model.norm, model.lm_head)}
    if len(floats) > 1 or not floats.pop().is_floating_point:
        return "its embedding, norms and head are of several types"
    if _has_any_global_hook():
        return "hooks are set on all modules"
    for name, module in model.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(_PLACES) and (kind.__module__, kind.__name__) not in _LAYERS:
            return f"{name} is a {kind.__module__}.{kind.__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
        forward = module.__dict__.get("forward")  # the device hooks of accelerate, and our own, are known
        known = "_hf_hook" in module.__dict__ or _home(forward).startswith("speckv_online.")
        if forward is not None and not known:
            return f"{name or 'the model'} has another forward"
    return ""


def _home(forward: Any) -> str:
    """Return the module in which a function or a method was written, whatever it wraps."""
    function = getattr(forward, "__func__", forward)
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


class GraphedLlama:
    """Reads a Llama through graphs.

    Parameters
    ----------
    model : PreTrainedModel
        Any model; where :func:`why_not` has a reason, there are no caches, and so nothing is read through graphs.
    capture : GraphCapture, optional
        By default CUDA graphs on a GPU, the stand-in elsewhere.

    Attributes
    ----------
    captures : int
        Graphs that were recorded so far: a step in which it grows takes longer than it usually does.
    failure : str
        Why graphs are not used for the model as it is now, empty if they are.
    """

    def __init__(self, model: PreTrainedModel, capture: GraphCapture | None = None) -> None:
        self.model: Any = model
        self._given, self._device = capture, model.device
        self.capture = capture_for(model.device) if capture is None else capture
        self.captures, self.failure = 0, ""
        self._made_of: list[Any] = []
        self._rooms: list[Room] = []  # those that no cache is in
        self._version = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a model has no graphs: they read this one's weights

    @torch.inference_mode()
    def cache(self, capacity: int) -> StaticKVCache | None:
        """Return an empty cache for a text of about so many tokens, or None where the model takes no graphs.

        Here, once per text, graphs are dropped that the model has outlived: weights in other places, other modules.
        A change of weights in place needs nothing: graphs read what is there.
        """
        made_of = _marks(self.model)
        if made_of != self._made_of:
            self._made_of, self._version = made_of, self._version + 1
            self._drop_rooms()
            self.failure = why_not(self.model)
            if self.failure:
                _LOG.info("%s is read without graphs: %s", type(self.model).__name__, self.failure)
        if self.failure:
            return None
        room = next((room for room in self._rooms if room.capacity >= capacity), None)
        if room is None:
            self._drop_rooms()  # all too short
            room = self._room(capacity)
            room.version = self._version
        else:
            self._rooms.remove(room)
            room.clear()
        cache = StaticKVCache(room)
        weakref.finalize(cache, self._give_back, room).atexit = False
        return cache

    def _drop_rooms(self) -> None:
        """Forget the rooms that no cache is in, and their graphs; record on the device where the model is by now."""
        self._rooms.clear()
        if self._given is None and self.model.device != self._device:
            self._device = self.model.device
            self.capture = capture_for(self._device)
        else:
            self.capture.part()

    def _room(self, capacity: int) -> Room:
        config, head = self.model.config, self.model.lm_head
        size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        dtype = self.model.get_input_embeddings().weight.dtype
        layers = min(len(self.model.model.layers), int(config.num_hidden_layers))
        heads = int(config.num_key_value_heads or config.num_attention_heads)
        return Room(layers, heads, size, capacity, int(head.out_features), dtype, self.model.device)

    def _give_back(self, room: Room) -> None:
        if room.version == self._version:
            self._rooms.append(room)

    def takes(self, cache: object, count: int) -> bool:
        """Return True if so many more tokens can be read into a cache through graphs."""
        if not isinstance(cache, StaticKVCache) or cache.left or self.failure or not 1 <= count <= MAX_WIDTH:
            return False
        return cache.room.version == self._version and len(cache) + count <= cache.room.capacity

    @torch.inference_mode()
    def record(self, length: int) -> int:
        """Record all graphs that steps of texts of up to so many tokens use; return how many there are now.

        Graphs are recorded when they are first needed. A benchmark records them before the clock runs.
        """
        cache = self.cache(length)
        window = SHORTEST
        while cache is not None and window <= bucket(length) and not self.failure:
            for width in range(1, MAX_WIDTH + 1):
                cache.truncate(0)
                cache.advance(window - width)
                self._record(cache, [0] * width)
            window *= 2
        return self.captures

    def _record(self, cache: StaticKVCache, ids: list[int]) -> None:
        """Record what reads these tokens in a step."""
        self.read(ids, cache, len(ids))

    @torch.inference_mode()
    def read(self, ids: Sequence[int], cache: KVCache, keep: int, drafts: torch.Tensor | None = None) -> torch.Tensor:
        """Read tokens into a cache; return the logits behind the last ``keep`` of them.

        Parameters
        ----------
        ids : sequence of int
        cache : KVCache
            One of :meth:`cache`; into another the model itself reads.
        keep : int
            At least 1, at most as many as there are tokens.
        drafts : Tensor, shape (n, 5), optional
            More tokens, in the first column, that only the device knows.

        Returns
        -------
        Tensor, shape (keep, rows of the head)
            Nothing overwrites it.
        """
        count = len(ids) + (0 if drafts is None else len(drafts))
        wanted = 1 if keep == 1 else count
        if not 1 <= keep <= count:
            raise ValueError(f"of {count} tokens the last {keep} are wanted")
        if isinstance(cache, StaticKVCache) and self.takes(cache, count):
            room, window = cache.room, bucket(len(cache) + count)
            self._send(ids, cache, drafts)
            make = partial(self._reader, room, count, wanted, window)
            graph = self._graph(room, ("read", count, wanted, window), make)
            if graph is not None:
                graph()
                cache.advance(count)
                return room.logits[wanted - keep : wanted].clone()
        device = self.model.device
        whole = torch.tensor([list(ids)], device=device)
        if drafts is not None:
            whole = torch.cat((whole, drafts[None, :, 0].to(device, torch.int64)), dim=1)
        return self.model(input_ids=whole, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]

    def _send(self, ids: Sequence[int], cache: StaticKVCache, drafts: torch.Tensor | None = None) -> None:
        """Have the device know what is to be read, without waiting for it."""
        known = len(self.model.get_input_embeddings().weight)
        if ids and not 0 <= min(ids) <= max(ids) < known:  # a GPU would not survive them
            raise IndexError(f"token ids from {min(ids)} to {max(ids)}, the model has {known}")
        room = cache.room
        self.capture.upload([len(cache), 0, *ids], room.inputs)
        if drafts is not None:
            room.ids[len(ids) : len(ids) + len(drafts)].copy_(drafts[:, 0], non_blocking=True)

    def _graph(
        self, room: Room, key: tuple[Any, ...], make: Callable[[], Callable[[], None]]
    ) -> Callable[[], None] | None:
        """Return a room's graph, recorded now if it is new; None where it cannot be recorded.

        The inputs must be there: recording runs it too.
        """
        graph: Callable[[], None] | None = room.graphs.get(key)
        if graph is None:
            self.captures += 1
            try:
                graph = room.graphs[key] = self.capture.capture(make(), room.inputs)
            except RuntimeError as error:
                self.failure = " ".join(str(error).split())[:200] or type(error).__name__
                _LOG.warning("no graph could be recorded of %s: %s", type(self.model).__name__, self.failure)
                return None
        return graph

    def _reader(self, room: Room, count: int, keep: int, window: int) -> Callable[[], None]:
        """Return the function of a graph that reads the inputs' first tokens."""
        forward = self._forward(room, count, keep, window)

        def body() -> None:
            room.logits[:keep].copy_(forward())

        return body

    def _forward(self, room: Room, count: int, keep: int, window: int) -> Callable[[], torch.Tensor]:
        """Return a forward of the inputs' first tokens, which gives the last ``keep`` rows of logits."""
        model, view = self.model, WindowCache(room, window)

        def forward() -> torch.Tensor:
            positions = room.start + room.steps[:count]
            hidden = model.model(
                input_ids=room.ids[None, :count],
                position_ids=positions[None],
                attention_mask=room.mask(positions, window),
                past_key_values=view.aim(positions),
                use_cache=True,
            ).last_hidden_state
            logits: torch.Tensor = model.lm_head(hidden[:, -keep:])[0]
            return logits

        return forward


def _marks(model: nn.Module) -> list[Any]:
    """Return what tells a model from one that graphs were not recorded of: its modules, and where its tensors are."""
    found: list[Any] = [getattr(model.config, "_attn_implementation", ""), model.training, _has_any_global_hook()]
    for module in model.modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((id(module), type(module), hooks, id(module.__dict__.get("forward"))))
        tensors = [*module._parameters.values(), *module._buffers.values()]
        found += [(id(t), t.data_ptr(), id(getattr(t, "quant_state", None))) for t in tensors if t is not None]
    return found


def attach(model: PreTrainedModel, capture: GraphCapture | None = None) -> GraphedLlama:
    """Let decoders read a model through graphs from now on."""
    graphs = GraphedLlama(model, capture)
    model._graphs = graphs  # type: ignore[assignment]
    return graphs


def graphs_of(model: nn.Module) -> GraphedLlama | None:
    """Return what a model is read through, if :func:`attach` was called for it."""
    graphs = model.__dict__.get("_graphs")
    return graphs if isinstance(graphs, GraphedLlama) and graphs.model is model else None
