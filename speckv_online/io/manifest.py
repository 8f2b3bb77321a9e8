"""What a figure has to be reported with: hardware, threads, versions, commit, seeds and model revisions."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import speckv_online

PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "ray", "river", "numpy", "safetensors")


def collect(**facts: Any) -> dict[str, Any]:
    """Return a manifest of this process and machine; ``facts`` are added as they are.

    It holds no user name, host name or path, so that a run directory can be passed on.
    """
    return {
        "kind": "speckv-run",
        "version": speckv_online.__version__,
        "status": "running",
        "started": now(),
        "hardware": hardware(),
        "software": software(),
        "git": git_state(),
        **facts,
    }


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cores() -> int:
    """Return how many CPU cores this process may use (affinity and container quota included)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return max(1, count)


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory in GB and GPUs."""
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": cores(),
        "memory_gb": memory,
        "gpus": gpus,
    }


def software() -> dict[str, str | None]:
    """Return the Python version and those of the packages that matter; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_state() -> dict[str, Any]:
    """Return the commit that the code comes from and whether the tree had changes; None outside of a repository.

    A job that runs in an unpacked copy has no repository: the submitter's commit can be handed over in
    ``SPECKV_GIT_COMMIT``.
    """
    folder = Path(speckv_online.__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("SPECKV_GIT_COMMIT"), "dirty": None}
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def weight_hashes(source: str | Path) -> dict[str, str]:
    """Return the SHA-256 of a GGUF file or of every weight file in a directory; empty for a name on the model hub."""
    folder = Path(source).expanduser()
    if folder.is_file():
        return {folder.name: sha256(folder)}
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def describe(manifest: Mapping[str, Any]) -> str:
    """Return one line for people: processor, cores, versions and commit."""
    hard, soft, git = manifest.get("hardware", {}), manifest.get("software", {}), manifest.get("git", {})
    commit = (git.get("commit") or "unknown")[:10] + (" with changes" if git.get("dirty") else "")
    parts = [hard.get("processor") or hard.get("machine"), f"cores: {hard.get('cores')}", *hard.get("gpus", [])]
    parts += [f"torch {soft.get('torch')}", f"transformers {soft.get('transformers')}", f"commit {commit}"]
    return ", ".join(str(part) for part in parts)


def _git(folder: Path, *arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
