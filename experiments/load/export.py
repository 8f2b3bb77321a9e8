"""The default target and its draft as two folders that any engine reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from speckv_online.errors import UserError
from speckv_online.models.distilled_draft import load_shipped_draft
from speckv_online.models.pairs import prepare

#: Files that only our own loader reads.
_OURS = ("checksums.json",)


def export(folder: Path) -> tuple[Path, Path]:
    """Write ``target`` and ``draft`` into a folder, unless they are there; the draft has the target's whole head.

    Returns
    -------
    tuple of Path
        The folders of the target and of the draft.
    """
    target, draft = folder / "target", folder / "draft"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, write in ((target, _write_target), (draft, _write_draft)):
            if not path.is_dir():
                partial = folder / f".partial-{path.name}"
                shutil.rmtree(partial, ignore_errors=True)
                write(partial)
                partial.rename(path)
    except OSError as error:
        raise UserError(f"cannot write the models to {folder}: {error.strerror or error}") from error
    return target, draft


def _write_target(path: Path) -> None:
    shutil.copytree(prepare("smollm2"), path, ignore=shutil.ignore_patterns(*_OURS))


def _write_draft(path: Path) -> None:
    source = prepare("smollm2")
    load_shipped_draft(source, torch.device("cpu"), full_head=True)[0].save_pretrained(path)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, path)


def sizes(path: Path) -> dict[str, int]:
    """Return what a model's config says of its size."""
    found = json.loads((path / "config.json").read_text())
    return {key: found[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
