"""Short hashes of models and drafters, so that traces of different ones are never mixed."""

from __future__ import annotations

import hashlib

import torch


def fingerprint(model: torch.nn.Module, sample: int = 4096) -> str:
    """Return a short hash of a model's tensors: names, types, shapes and an even sample of the bytes of each.

    A sample, since hashing all of a large model takes longer than tracing a prompt; retrained or requantized weights
    differ in every tensor.
    """
    marks, kept = model.__dict__.get("_kept_fingerprint", ((), ""))
    if kept and marks == _marks(model):
        return str(kept)
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


def remember_fingerprint(model: torch.nn.Module) -> str:
    """Take a 4-bit model's fingerprint while that can be done: before its first forward. Of others it is empty."""
    if not any(type(m).__name__ == "Linear4bit" for m in model.modules()):
        return ""
    model._fingerprint = taken = fingerprint(model)  # type: ignore[assignment]
    return taken


def know_fingerprint(model: torch.nn.Module, taken: str) -> None:
    """Note the fingerprint of a model as it is now: it need not be read while its parameters stay."""
    model._kept_fingerprint = _marks(model), taken  # type: ignore[assignment]


def _marks(model: torch.nn.Module) -> list[tuple[int, int, int]]:
    return [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
