"""The default draft: some layers of the target, distilled; its embedding and head are rows of the target's own."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from speckv_online.errors import UserError
from speckv_online.io.manifest import sha256
from speckv_online.models.skeleton import without_weights

DRAFT_FILE = "draft-smollm2.safetensors"
_EMBEDDING = "model.embed_tokens.weight"


def load_shipped_draft(
    target: Path,
    device: torch.device,
    path: Path | None = None,
    full_head: bool = False,
    shared: torch.nn.Module | None = None,
) -> tuple[PreTrainedModel, torch.Tensor, str]:
    """Build the draft from its own layers and the target's embedding.

    Parameters
    ----------
    target : Path
        Folder of the converted target.
    device : torch.device
        fp16 on CUDA, fp32 on a CPU.
    path : Path, optional
        Another draft file of the same format as the one in the package.
    full_head : bool
        Give the draft all rows of the target's head, as transformers' own ``assistant_model=`` needs: slower, and able
        to propose any token.
    shared : Module, optional
        The embedding of a target that keeps its own blocks: the draft then has no embedding of its own.

    Returns
    -------
    model : LlamaForCausalLM
        Its ``lm_head`` has one row per entry of ``head_ids``.
    head_ids : Tensor of int64, shape (rows,)
    digest : str
        SHA-256 of the draft file.
    """
    with as_file(files("speckv_online") / "data" / DRAFT_FILE) as shipped:
        source = path or shipped
        try:
            with safe_open(source, "pt") as f:
                header = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as e:
            raise UserError(f"cannot read the draft {source}: {e}") from e
        if header.get("format") != "speckv-draft" or header.get("version") != "1":
            raise UserError(f"{source} is no speckv-draft of version 1: make one with python -m experiments.distill")
        digest = sha256(source)
    config, head_ids = AutoConfig.from_pretrained(target), tensors.pop("head_ids").long()
    if full_head:
        head_ids = torch.arange(config.vocab_size)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    state = {name: t.to(dtype) for name, t in tensors.items()}
    if shared is None:
        embedding = shipped_embedding(target)
        state |= {_EMBEDDING: embedding.to(dtype), "lm_head.weight": embedding[head_ids].to(dtype)}
    else:
        state |= {_EMBEDDING: shared.weight, "lm_head.weight": shared(head_ids).to(dtype)}
    config.num_hidden_layers = len(header["kept_layers"].split(","))
    config.tie_word_embeddings = False
    with without_weights():
        model = LlamaForCausalLM(config)
        model.lm_head = torch.nn.Linear(config.hidden_size, len(head_ids), bias=False)
        if shared is not None:
            model.model.embed_tokens = shared
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise UserError(f"{source} does not fit the target {target.name}: {' '.join(str(e).split())[:200]}") from e
    torch.nn.Module.to(model, device)
    return model.eval(), head_ids, digest


def shipped_embedding(target: Path) -> torch.Tensor:
    """Return the embedding of a converted target, mapped."""
    with safe_open(target / "model.safetensors", "pt") as f:
        found: torch.Tensor = f.get_tensor(_EMBEDDING)
    return found
