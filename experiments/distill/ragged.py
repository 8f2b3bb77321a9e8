"""A plain Llama in fp32 over preallocated ragged caches.

A batch of sequences in different phases is what a stock ``generate`` cannot run; a test compares this with
transformers' own logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


class RaggedLlama:
    """A Llama (no biases) that decodes one token for each of ``slots`` independent sequences.

    Parameters
    ----------
    model : LlamaForCausalLM
        Weights in fp32; the tensors are referenced or fused, the module itself is not kept.
    slots, max_len : int
        Batch size and the longest sequence that a slot can hold.
    """

    def __init__(self, model: PreTrainedModel, slots: int, max_len: int) -> None:
        cfg = model.config
        self.heads, self.kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.head_dim = cfg.hidden_size // self.heads
        self.eps = cfg.rms_norm_eps
        self.embed = model.model.embed_tokens.weight.detach()
        self.head = model.lm_head.weight.detach()
        self.norm = model.model.norm.weight.detach()
        self.layers = []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            self.layers.append(
                (
                    layer.input_layernorm.weight.detach(),
                    torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).detach(),
                    a.o_proj.weight.detach(),
                    layer.post_attention_layernorm.weight.detach(),
                    torch.cat([m.gate_proj.weight, m.up_proj.weight]).detach(),
                    m.down_proj.weight.detach(),
                )
            )
        theta = cfg.rope_parameters["rope_theta"]
        inv = 1.0 / theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.outer(torch.arange(max_len).float(), inv)
        self.cos, self.sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        shape = (len(self.layers), slots, self.kv_heads, max_len, self.head_dim)
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.rows = torch.arange(slots)
        self.columns = torch.arange(max_len)

    def _rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Feed one token per slot and return the final normed hidden states, shape (slots, hidden)."""
        n, kv, d = len(tokens), self.kv_heads, self.head_dim
        longest = int(positions.max()) + 1
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        mask = torch.zeros(n, 1, 1, longest).masked_fill(
            self.columns[:longest] > positions[:, None, None, None], -torch.inf
        )
        x = self.embed[tokens]
        for i, (ln1, qkv, o, ln2, gate_up, down) in enumerate(self.layers):
            h = F.linear(F.rms_norm(x, (x.shape[-1],), ln1, self.eps), qkv)
            q, k, v = h.split([self.heads * d, kv * d, kv * d], -1)
            q = self._rope(q.view(n, self.heads, d), cos, sin).view(n, kv, self.heads // kv, d)
            self.k[i, self.rows, :, positions] = self._rope(k.view(n, kv, d), cos, sin)
            self.v[i, self.rows, :, positions] = v.view(n, kv, d)
            keys, values = self.k[i, :, :, :longest], self.v[i, :, :, :longest]
            # Query heads that share keys become rows of one head, so that each cache is read once.
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + F.linear(mixed.reshape(n, -1), o)
            gate, up = F.linear(F.rms_norm(x, (x.shape[-1],), ln2, self.eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.rms_norm(x, (x.shape[-1],), self.norm, self.eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of states that :meth:`step` gave, shape (slots, vocabulary)."""
        return F.linear(hidden, self.head)
