"""What the CPU engine must be able to do here, as the system says it and not as the engine finds it; a model for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def _flags() -> frozenset[str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


FLAGS = _flags()
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= FLAGS
#: On such a processor the engine must be on: a test that finds it off fails.
SUPPORTED = {"avx2", "fma", "f16c"} <= FLAGS
#: Levels that bitsandbytes has a quick path for, which is where the engine has one.
LEVELS = {"fp32": SUPPORTED, "fp16": SUPPORTED, "bf16": SUPPORTED, "int8": AVX512}
LEVELS |= dict.fromkeys(("nf4", "fp4"), AVX512 and "avx512_bf16" in FLAGS)
needs_engine = pytest.mark.skipif(not SUPPORTED, reason="the engine has no kernels for this processor")


def needs_level(level: str) -> None:
    """Skip a test where the engine has nothing for a level on this processor."""
    if not LEVELS[level]:
        pytest.skip(f"the engine has no kernels for {level} on this processor")


def small_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama of a size that the engine takes, with norms that change something and weights that fp16 holds."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 400}
    model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": 304, **sizes, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1.0 + 0.3 * torch.randn_like(p) if "norm" in name else 3.0 * p).half())
    return model
