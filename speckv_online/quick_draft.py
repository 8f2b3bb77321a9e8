"""A Llama draft for one sequence on a CPU: 8-bit weights, few calls, and the same answer at every width.

On a CPU one token of a small draft takes as long as its weights take to be read, and as the calls of its forward take
to be made. Here weights are rounded to 8 bits as in GGUF's Q8_0, layers that read the same input are one matrix,
norms' weights are folded into the matrices behind them, and rotary pairs lie side by side, so that rotating is one
complex product. Nothing of that can change what is decoded, only how often a draft is right (docs/draft.md).

What a token's logits are depends on the tokens before it alone, to the last bit, however many of them are read in one
forward: rows are multiplied by the same kernel at any width and attended to one by one. Only the prompt is read another
way, all of it at once and with the weights as they were, and so it is the same each time too. An exact trace is
therefore what the decoder drafts, whenever it does.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from speckv_online.jit import double
from speckv_online.kernels import Shape, compiled, lay_out, round_to_8_bits, shape
from speckv_online.kvcache import KVCache
from speckv_online.norms import normed

#: Prompts of at most this many tokens are read as all other tokens are.
SHORT = 16
#: Largest error of the logits, relative to their spread, that passes for rounding to 8 bits.
_TOLERANCE = 0.1


class _Matrix:
    """A weight in 8 bits, and as it was where a prompt is read with it."""

    def __init__(self, weight: torch.Tensor, use: Shape) -> None:
        numbers, scales = round_to_8_bits(weight)
        self.exact = weight.contiguous()
        self._packed = lay_out((numbers * scales).view_as(weight), use)
        self._kernel = compiled(use)[self._packed[0].dtype]

    def times(self, x: torch.Tensor, wide: bool) -> torch.Tensor:
        """Return ``x @ weight.T``; ``wide`` with the weight as it was."""
        if wide:
            return nn.functional.linear(x, self.exact)
        x, (weight, scales), (outputs, inputs) = x.contiguous(), self._packed, self.exact.shape
        out = x.new_empty(len(x), outputs)
        self._kernel(x.data_ptr(), weight.data_ptr(), out.data_ptr(), len(x), inputs, outputs, scales.data_ptr())
        return out


class QuickDraft:
    """The forward of a Llama draft over a :class:`~speckv_online.kvcache.KVCache`; made by :func:`quicken`.

    Parameters
    ----------
    model : LlamaForCausalLM
        In fp32 on the CPU. Its embedding is shared, all other weights are copied.
    use : Shape
        How the processor's registers are used.
    """

    def __init__(self, model: LlamaForCausalLM, use: Shape) -> None:
        config, body = model.config, model.model
        self.heads, self.groups = int(config.num_attention_heads), int(config.num_key_value_heads or 0)
        self.size = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.ones, self.eps = torch.ones(int(config.hidden_size)), double(float(config.rms_norm_eps))
        self.embedding = body.embed_tokens.weight.detach()
        # The two halves of a head that rotate against each other, interleaved.
        order = torch.arange(self.size).view(2, -1).t().reshape(-1)
        self.layers = []
        for layer in body.layers:
            a, f = layer.self_attn, layer.mlp
            query, key = (
                p.weight.view(-1, self.size, p.in_features)[:, order].flatten(0, 1) for p in (a.q_proj, a.k_proj)
            )
            together = torch.cat((query * self.size**-0.5, key, a.v_proj.weight)) * layer.input_layernorm.weight
            gated = torch.cat((f.gate_proj.weight, f.up_proj.weight)) * layer.post_attention_layernorm.weight
            weights = (together, a.o_proj.weight, gated, f.down_proj.weight)
            self.layers.append(tuple(_Matrix(w.detach().float(), use) for w in weights))
        self.head = _Matrix((model.lm_head.weight * body.norm.weight).detach().float(), use)
        angles = torch.arange(config.max_position_embeddings)[:, None] * body.rotary_emb.inv_freq.float()
        self.turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def read(self, ids: torch.Tensor, cache: KVCache, prompt: int) -> torch.Tensor:
        """Read tokens into the cache, at first at least the whole prompt; return the next one's logits.

        Parameters
        ----------
        ids : Tensor of int, shape (n,)
        cache : KVCache
        prompt : int
            How many tokens the sequence's prompt has.

        Returns
        -------
        Tensor, shape (rows of the head,), fp32
        """
        state = None
        if prompt > SHORT and len(cache) == 0:
            state, ids = self._forward(ids[:prompt], cache, wide=True), ids[prompt:]
        if len(ids):
            state = self._forward(ids, cache, wide=False)
        if state is None:
            raise ValueError("there is no token to read")
        return self.head.times(self._normed(state), wide=False)[0]

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """RMS norm without its weights."""
        return normed(x, self.ones, self.eps)

    def _forward(self, ids: torch.Tensor, cache: KVCache, wide: bool) -> torch.Tensor:
        """Read tokens; return the last one's state behind the last layer, shape (1, hidden size)."""
        count, start, both = len(ids), len(cache), self.heads + self.groups
        x, turns = nn.functional.embedding(ids, self.embedding), self.turns[start : start + count]
        for i, (together, out, gated, down) in enumerate(self.layers):
            y = together.times(self._normed(x), wide).view(count, -1, self.size)
            pairs = torch.view_as_complex(y[:, :both].unflatten(-1, (-1, 2)))
            turned = torch.view_as_real(pairs * turns).flatten(-2)
            new = turned[:, self.heads :].transpose(0, 1), y[:, both:].transpose(0, 1)
            keys, values = cache.update(new[0][None], new[1][None], i)
            attend = self._attend_all if wide else self._attend_each
            x = x + out.times(attend(turned[:, : self.heads], keys[0], values[0]), wide)
            gate, up = gated.times(self._normed(x), wide).chunk(2, -1)
            x += down.times(nn.functional.silu(gate).mul_(up), wide)
        return x[-1:]

    def _attend_each(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention of the last rows one by one: queries (n, heads, size), keys and values (groups, length, size)."""
        before, rows = keys.shape[1] - len(queries) + 1, []
        for i, row in enumerate(queries.reshape(len(queries), self.groups, -1, self.size)):
            shares = torch.bmm(row, keys[:, : before + i].transpose(1, 2)).softmax(-1)
            rows.append(torch.bmm(shares, values[:, : before + i]).view(-1))
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)

    def _attend_all(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Causal attention of a whole sequence, of shapes as in :meth:`_attend_each`."""
        q, k, v = queries.transpose(0, 1)[None], keys[None], values[None]
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
        return found[0].transpose(0, 1).flatten(1)


@torch.inference_mode()
def quicken(model: PreTrainedModel) -> QuickDraft | None:
    """Return the quick form of a draft, or None where there is none or it would not pay.

    It takes a plain Llama (default rotary embedding, no biases) in fp32 on a CPU that :mod:`speckv_online.kernels` has
    kernels for. Where they cannot be compiled, or the answer is not the model's up to rounding, there is no quick form.
    """
    config, use = model.config, shape()
    if type(model) is not LlamaForCausalLM or use is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    linear = {type(m) for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    plain = rope.get("rope_type", "default") == "default" and config.hidden_act == "silu"
    if not plain or any(name.endswith("bias") for name, _ in model.named_parameters()):
        return None
    weights = [p for p in model.parameters() if p.device.type != "cpu" or p.dtype != torch.float32]
    if weights or not all(issubclass(kind, nn.Linear) for kind in linear):
        return None
    ids = torch.arange(1, 2 * SHORT) % len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    try:
        quick = QuickDraft(model, use)
        found = [quick.read(ids, KVCache(len(quick.layers), len(ids)), prompt) for prompt in (1, len(ids))]
    except (AttributeError, ImportError, OSError, RuntimeError):  # no llvmlite, another torch or LLVM, odd sizes
        return None
    expected = model(input_ids=ids[None], logits_to_keep=1).logits[0, -1]
    close = all(bool((logits - expected).std() <= _TOLERANCE * expected.std()) for logits in found)
    return quick if close else None
