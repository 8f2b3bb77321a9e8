"""What the tests of comparison runs share: policies that count, settings for the tiny pair, and ways to run them."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.runtime.settings import CompareConfig
from policies.acceptance.mlp16 import SHAPES
from policies.base import Context, Decision, Outcome, Policy, PolicyError, State
from speckv_online.io.prompts import Prompt

if TYPE_CHECKING:  # the learner imports the policies of this module, and has no use for torch
    from tests.support.tiny_models import TinyPair

ROOT = Path(__file__).parents[2]
PROMPTS = [Prompt("p0", "chat", "hello"), Prompt("p1", "code", "x = 1"), Prompt("p2", "math", "2+2")]


class Counter(Policy):
    """Drafts two tokens and counts what it has learnt, in a form that adds up."""

    summary = "counts"
    learns = True

    def __init__(self, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.total, self.fresh = 0.0, 0.0

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(2, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if self.first_time(decision.id):
            self.total += outcome.produced
            self.fresh += outcome.produced

    def state_dict(self) -> State:
        return {"total": np.array(self.total)}

    def load_state_dict(self, state: State) -> None:
        if set(state) != {"total"}:
            raise PolicyError("not a counter's state")
        self.total, self.fresh = float(state["total"]), 0.0

    def take_delta(self) -> State:
        delta, self.fresh = {"total": np.array(self.fresh)}, 0.0
        return delta

    def merge(self, delta: State) -> None:
        self.total += float(delta["total"])


class Hermit(Counter):
    """Learns as :class:`Counter` does, but shares nothing."""

    def take_delta(self) -> State:
        return {}


class Faulty(Counter):
    """Raises every time."""

    def decide(self, context: Context) -> Decision:
        raise RuntimeError("no idea")


class Vandal(Counter):
    """Breaks a model's weights while it decodes, so that the next level cannot load them."""

    def __init__(self, *, file: str = "", seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.file = Path(file)

    def decide(self, context: Context) -> Decision:
        broken = self.file.with_suffix(".broken")
        if broken.exists():
            broken.replace(self.file)  # a new file: the model at work may still read the old one
        return super().decide(context)


class Brim(Counter):
    """Has the system refuse larger files while fp32 is decoded: a disk that is full, and free again later."""

    def decide(self, context: Context) -> Decision:
        limit = 9000 if context.level == "fp32" else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return super().decide(context)


class Filler(Counter):
    """Fills the disk that a file is on, in its fifth decision, and only once."""

    def __init__(self, *, file: str = "", seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.file, self.left = Path(file), 5

    def decide(self, context: Context) -> Decision:
        self.left -= 1
        once = self.file.with_suffix(".once")
        if not self.left and not once.exists():
            once.touch()
            with suppress(OSError), self.file.open("wb", buffering=0) as ballast:
                while ballast.write(bytes(1 << 12)):
                    pass
        return super().decide(context)


class Patient(Counter):
    """Decides nothing until a file exists."""

    def __init__(self, *, file: str = "", seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.file = Path(file)

    def decide(self, context: Context) -> Decision:
        while not self.file.exists():
            time.sleep(0.02)
        return super().decide(context)


class Hard(Counter):
    """Does something that no guard can catch, in the call and at the prompt (by its number of calls) that it is told.

    ``exit`` ends the process; ``loop`` never comes back; ``deaf`` catches whatever would end its loop; ``native`` loops
    without giving any Python code a chance; ``panic`` raises what is no exception; ``raise`` raises one.
    """

    def __init__(
        self, *, act: str = "exit", call: str = "decide", after: int = 2, seed: int = 0, worker: int = 0
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        self.act, self.call, self.left = act, call, after

    def perhaps(self, call: str) -> None:
        if call != self.call:
            return
        self.left -= 1
        if self.left >= 0:
            return
        if self.act == "exit":
            os._exit(7)
        if self.act == "raise":
            raise ValueError("on purpose")
        if self.act == "panic":
            raise Panic("on purpose")
        if self.act == "native":
            deque(repeat(None), maxlen=0)
        while True:
            try:
                while True:
                    pass
            except BaseException:
                if self.act != "deaf":
                    raise

    def decide(self, context: Context) -> Decision:
        self.perhaps("decide")
        return super().decide(context)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.perhaps("learn")
        super().learn(decision, outcome)

    def take_delta(self) -> State:
        self.perhaps("take_delta")
        return super().take_delta()

    def merge(self, delta: State) -> None:
        self.perhaps("merge")
        super().merge(delta)


class Panic(BaseException):
    """What extensions in Rust raise."""


COUNTER, HERMIT, FAULTY, PATIENT = (f"tests.support.runs:{name}" for name in ("Counter", "Hermit", "Faulty", "Patient"))
HARD = "tests.support.runs:Hard"


def make_config(pair: TinyPair, **changes: Any) -> CompareConfig:
    """Settings of a small local run on the tiny pair."""
    values: dict[str, Any] = {
        "target": str(pair.target_dir), "draft": str(pair.draft_dir), "levels": ("fp32", "fp16"),
        "policies": ("autoregressive", "fixed:2", COUNTER), "max_new_tokens": 12, "threads": 1, "device": "cpu",
        "local": True,
    }  # fmt: skip
    return CompareConfig(**(values | changes))


def flags(config: CompareConfig, *more: object) -> list[str]:
    """The command line that gives a config again."""
    found: list[str] = []
    for key, value in asdict(config).items():
        if value == getattr(CompareConfig(), key) or key == "resources":
            continue
        flag = f"--{key.replace('_', '-')}"
        found += [flag] if value is True else [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    return [*found, *map(str, more)]


def write_prompts(path: Path, prompts: Sequence[Prompt] = PROMPTS) -> Path:
    """Write prompts as JSONL."""
    path.write_text("".join(json.dumps({"id": p.id, "task": p.task, "prompt": p.text}) + "\n" for p in prompts))
    return path


def write_weights(path: Path) -> str:
    """Write random MLP16 weights, so that tests need no trained ones."""
    rng = np.random.default_rng(0)
    np.savez(path, **{key: rng.normal(0, 0.3, shape) for key, shape in SHAPES.items()})
    return str(path)


def environment(**more: str) -> dict[str, str]:
    """The environment of a command: no Ray but the one it is told of."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    patient = {"RAY_raylet_start_wait_time_s": "150"}  # a machine with other work starts Ray slowly
    return kept | patient | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
