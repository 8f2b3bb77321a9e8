"""Write the trained draft in the form that the package loads, and a card that says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from experiments.distill.draft import Draft
from speckv_online.io.files import write_atomically

LICENSE_NOTE = (
    "Derived from SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0) and under the same licence. "
    "The weights it started from were 4-bit (Q4_1 GGUF) before they were converted."
)


def export_draft(draft: Draft, pair: str, path: Path) -> None:
    """Write layers, final norm (fp16) and ``head_ids`` (int32) to ``path``, atomically; the embedding is not stored."""
    tensors = {name: p.detach().to(torch.float16).contiguous() for name, p in draft.trained().items()}
    tensors["head_ids"] = draft.head_ids.to(torch.int32)
    header = {
        "format": "speckv-draft",
        "version": "1",
        "target": pair,
        "kept_layers": ",".join(map(str, draft.kept_layers)),
    }
    blob = save(tensors, header)
    write_atomically(path, lambda f: f.write(blob), binary=True)


def write_card(
    path: Path,
    notes: dict[str, Any],
    target_sha256: str,
    draft_sha256: str,
) -> None:
    """Write the draft's card as JSON: the settings and log of its training (``notes``)."""
    card = {
        "format": "speckv-draft",
        "version": "1",
        "draft_sha256": draft_sha256,
        "target": notes["settings"]["pair"],
        "target_sha256": target_sha256,
        "license": "Apache-2.0",
        "license_note": LICENSE_NOTE,
        "settings": notes["settings"],
        "training": {k: v for k, v in notes.items() if k != "settings"},
    }
    write_atomically(path, lambda f: f.write(json.dumps(card, indent=1) + "\n"))
