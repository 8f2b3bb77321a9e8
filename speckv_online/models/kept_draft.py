"""The default draft with its 8-bit form, kept and mapped as targets are (:mod:`speckv_online.models.kept_model`)."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from speckv_online.cpu_engine.int8_draft import Int8Draft
from speckv_online.cpu_engine.kernels.int8_blocks import lanes
from speckv_online.cpu_engine.pack import laid_out
from speckv_online.cpu_engine.start import int8_draft, start_engine
from speckv_online.cpu_engine.verdicts import environment
from speckv_online.io.user_cache import key_of
from speckv_online.modeling.fingerprint import know_fingerprint
from speckv_online.models.distilled_draft import DRAFT_FILE, load_shipped_draft, shipped_embedding
from speckv_online.models.kept_model import FORMAT, KEPT, fill, layouts_of, own_weights, stamps
from speckv_online.models.skeleton import without_weights

_EMBEDDING = "model.embed_tokens.weight"

#: Draft, its head's ids, the hash of its file, its 8-bit form.
Loaded = tuple[PreTrainedModel, torch.Tensor, str, Int8Draft | None]


def load_default_draft(target: Path, where: torch.device, engine: str, shared: torch.nn.Module | None) -> Loaded:
    """Return the default draft of a target, run by the engine where it can.

    Parameters
    ----------
    target : Path
        Folder of the converted target.
    where : torch.device
    engine : str
        ``auto`` or ``off``.
    shared : Module, optional
        As :func:`~speckv_online.models.distilled_draft.load_shipped_draft` takes it.
    """
    if where.type != "cpu" or engine == "off" or lanes() is None:
        return _load(target, where, engine, shared)
    with as_file(files("speckv_online") / "data" / DRAFT_FILE) as shipped:
        about = "" if shared is None else str(getattr(shared, "kind", ""))
        key = key_of(FORMAT, str(shipped), about, *stamps(shipped), *stamps(target), *environment())
    if (found := _kept(key, target, shared)) is not None:
        return found
    with KEPT.lock():
        if (found := _kept(key, target, shared)) is not None:
            return found
        model, head_ids, digest = load_shipped_draft(target, where, shared=shared)
        own, taken = own_weights(model)
        loaded = _run(model, head_ids, digest, engine)
        _keep(key, loaded, own, taken)
    return _kept(key, target, shared) or loaded


def _load(target: Path, where: torch.device, engine: str, shared: torch.nn.Module | None) -> Loaded:
    return _run(*load_shipped_draft(target, where, shared=shared), engine)


def _run(model: PreTrainedModel, head_ids: torch.Tensor, digest: str, engine: str) -> Loaded:
    compiled = int8_draft(model, engine)
    start_engine(model, engine)
    return model, head_ids, digest, compiled


def _keep(key: str, loaded: Loaded, own: dict[str, torch.Tensor], taken: str) -> None:
    model, head_ids, digest, compiled = loaded
    if compiled is None or not (laid := laid_out(model)):
        return
    tensors = {"head_ids": head_ids} | {f"int8/{i}": t for i, t in enumerate(compiled.weights)}
    tensors |= {f"own/{name}": t for name, t in own.items() if name != _EMBEDDING}
    for part in range(2):
        tensors |= {f"laid/{name}/{part}": parts[part] for name, parts in laid.items()}
    KEPT.put(key, {"config": model.config.to_dict(), "digest": digest, "fingerprint": taken}, tensors)


def _kept(key: str, target: Path, shared: torch.nn.Module | None) -> Loaded | None:
    if (found := KEPT.get(key)) is None:
        return None
    facts, tensors = found
    config: Any = LlamaConfig.from_dict(facts["config"])
    with without_weights():
        model = LlamaForCausalLM(config)
        model.lm_head = torch.nn.Linear(config.hidden_size, len(tensors["head_ids"]), bias=False)
        if shared is not None:
            model.model.embed_tokens = shared
    own = {name.removeprefix("own/"): t for name, t in tensors.items() if name.startswith("own/")}
    if shared is None:
        own[_EMBEDDING] = shipped_embedding(target)
    fill(model.eval(), own)
    know_fingerprint(model, facts["fingerprint"])
    weights = [tensors[f"int8/{i}"] for i in range(sum(name.startswith("int8/") for name in tensors))]
    compiled = int8_draft(model, "auto", weights)
    start_engine(model, "auto", layouts_of(tensors))
    return model, tensors["head_ids"], facts["digest"], compiled
