"""Settings of the GPU benchmark, and what a stage is given: a device, a clock that runs down, and a file to write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from experiments.config import option
from speckv_online.console import say
from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically

if TYPE_CHECKING:
    import torch

#: Stages in the order of what they tell, with their seconds. Together they stay below nine minutes.
BUDGETS = {"lossless": 95, "decoding": 120, "costs": 85, "host": 25, "batches": 40, "ray": 100}
#: Seconds for all of them, and what starting one takes.
TOTAL, START = 530, 10


@dataclass(frozen=True)
class GpuConfig:
    """Settings of ``python -m experiments.bench.gpu``."""

    stages: tuple[str, ...] = option(tuple(BUDGETS), "stages to run, comma separated")
    device: str = option("auto", "auto, cpu or cuda; auto is cuda, and nothing runs where there is none")
    tiny: bool = option(False, "tiny random models and a few prompts: to try the script itself")
    out: str = option("runs/gpu", "directory of the stages' JSON files")
    seconds: int = option(0, "seconds for each stage (0: each its own, below nine minutes in all)")

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.stages) - set(BUDGETS)):
            raise UserError(f"unknown stage {unknown[0]!r}: choose from {', '.join(BUDGETS)}")
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise UserError("--stages must name at least one stage, and each once")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device must be auto, cpu or cuda, got {self.device!r}")
        if not 0 <= self.seconds <= 86_400:
            raise UserError(f"--seconds must be from 0 to 86400, got {self.seconds}")

    def budget(self, stage: str) -> int:
        """Return a stage's seconds."""
        return self.seconds or BUDGETS[stage]


class Skip(Exception):
    """What this machine lacks, in one line; only the part that needs it is left out."""


@dataclass
class Stage:
    """A stage at work.

    Attributes
    ----------
    name : str
    config : GpuConfig
    device : torch.device
    found : dict
        What the stage's file holds so far.
    """

    name: str
    config: GpuConfig
    device: torch.device
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = monotonic()
        self.ends = self.started + self.config.budget(self.name)
        self.folder = Path(self.config.out).expanduser()
        self.found = {"stage": self.name, "complete": False, "skipped": [], "failed": [], **self.found}

    @property
    def tiny(self) -> bool:
        """Whether everything is to be small."""
        return self.config.tiny

    def left(self) -> float:
        """Seconds that are left of the budget."""
        return self.ends - monotonic()

    def attempt(self, what: str, part: Callable[[], Any]) -> Any:
        """Do a part of the stage and return its result; None where time is up or the machine lacks something."""
        if self.left() <= 0:
            self.skip(what, f"the stage's {self.config.budget(self.name)} s are over")
            return None
        try:
            result = part()
        except (Skip, UserError, ImportError) as reason:
            self.skip(what, str(reason))
            return None
        except Exception as error:  # out of memory, a kernel that this device has not: other parts may do
            self.skip(what, f"{type(error).__name__}: {error}", "failed")
            return None
        say(f"{self.name}: {what} done, {self.left():.0f} s left")
        return result

    def skip(self, what: str, reason: str, how: str = "skipped") -> None:
        """Say what is ``skipped``, or has ``failed``, and why, in one line, and keep it."""
        reason = " ".join(reason.split())[:300]
        say(f"{self.name}: {what} {how}: {reason}")
        self.found[how].append({"what": what, "why": reason})
        self.save()

    def add(self, key: str, row: Any) -> None:
        """Append a row to one of the file's lists and write the file."""
        self.found.setdefault(key, []).append(row)
        self.save()

    def save(self) -> Path:
        """Write what there is so far."""
        self.found["seconds"] = monotonic() - self.started
        text = json.dumps(self.found, indent=1) + "\n"
        return write_atomically(self.folder / f"{self.name}.json", lambda f: f.write(text))
