"""The prompts that ship, and what names a set of prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import as_file, files

from speckv_online.io.prompts import Prompt, read_prompts

TASKS = ("code", "math", "chat", "summarization")


def bundled(split: str = "test") -> list[Prompt]:
    """Return the prompts that come with the project, of one split."""
    found: list[Prompt] = []
    for task in TASKS:
        with as_file(files("experiments") / "prompts" / f"{task}.jsonl") as path:
            found += [p for p in read_prompts(path) if p.split == split]
    return found


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of prompts, in hexadecimal."""
    return hashlib.sha256(json.dumps([asdict(p) for p in prompts]).encode()).hexdigest()
