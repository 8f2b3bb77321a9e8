"""Short hashes of models and drafters, so that traces of different ones are never mixed."""

from __future__ import annotations

import hashlib

import torch


def fingerprint(model: torch.nn.Module, sample: int = 4096) -> str:
    """Return a short hash of a model's tensors: names, types, shapes and an even sample of the bytes of each.

    A sample, since hashing all of a large model takes longer than tracing a prompt; retrained or requantized weights
    differ in every tensor.
    """
    # On CPUs with AVX-512 bitsandbytes (0.50) repacks 4-bit weights in the first forward; its state_dict then undoes
    # that only in part, and every later forward is wrong.
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        if isinstance(known := getattr(model, "_fingerprint", None), str):
            return known
        raise RuntimeError("take the fingerprint of a 4-bit model before its first forward")
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{getattr(value, 'dtype', '')}:{tuple(getattr(value, 'shape', ()))};".encode())
        if isinstance(value, torch.Tensor) and value.numel():
            flat = value.detach().reshape(-1)
            flat = flat[:: max(1, flat.numel() // sample)].contiguous().cpu()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def remember_fingerprint(model: torch.nn.Module) -> None:
    """Take a 4-bit model's fingerprint while that can be done: before its first forward."""
    if any(type(m).__name__ == "Linear4bit" for m in model.modules()):
        model._fingerprint = fingerprint(model)  # type: ignore[assignment]
