"""What is measured, in turns: every engine and mode decodes a prompt, then all go on to the next.

What is finished is appended to a file, if there is one, so that a later run goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

from experiments.bench.llamacpp.worker import Worker
from experiments.common.json_lines import append_line, read_lines
from speckv_online.errors import UserError

PLAIN, PEER = "plain", "llama.cpp"
#: Seconds between calls: threads of an engine that has ended spin for a while.
PAUSE = 0.25
WIDTHS = (1, 2, 5, 9)
#: Forwards of each width in a turn, those before them that do not count, and turns.
FORWARDS, UNCOUNTED, ROUNDS = 10, 4, 4
#: Cores that others may take; what is measured beside more is measured again, so many times at most.
QUIET, ATTEMPTS = 0.12, 2
#: Tokens, and turns, of the trials that choose llama.cpp's threads and its attention.
TRIAL_TOKENS, TRIALS = 32, 3


class OutOfTime(Exception):
    """The run has had its seconds."""


class Kept:
    """What was measured, by key; in memory, and in a file of JSON lines if there is one."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.until = path, monotonic() + seconds if seconds else float("inf")
        self.found = dict[str, Any]()
        try:
            self.found |= {item["key"]: item["found"] for item in (read_lines(path) if path else ())}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} holds no turns of this benchmark: {e}") from e

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def need(self, key: str) -> bool:
        """Return whether this is to be measured; raises :class:`OutOfTime` if it is and no time is left."""
        if key not in self.found and monotonic() > self.until:
            raise OutOfTime
        return key not in self.found

    def put(self, key: str, found: Any) -> None:
        """Keep something."""
        self.found[key] = found
        if self.path is not None:
            try:
                append_line(self.path, {"key": key, "found": found})
            except OSError as e:
                raise UserError(f"cannot write {self.path}: {e.strerror or e}") from e


@dataclass
class Plan:
    """What one file is measured with.

    Attributes
    ----------
    key : str
        Names the target, the format and the company.
    file, draft : Path
        The target's file and llama.cpp's draft, if any.
    ours : dict
        Our contestants by name: what their processes are made with.
    prompts : list of list of int
        Prompts; the first warms up and does not count.
    tokens : int
    modes : list of str
        llama.cpp's.
    policies : list of str
        Ours besides plain decoding.
    threads : int
        Most threads.
    busy : int
        Busy processes beside it.
    rounds : int
        Turns in which forwards are measured.
    """

    key: str
    file: Path
    draft: Path | None
    ours: dict[str, dict[str, Any]]
    prompts: list[list[int]]
    tokens: int
    modes: Sequence[str]
    policies: Sequence[str]
    threads: int
    busy: int = 0
    rounds: int = ROUNDS
    workers: dict[str, Worker] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """Tokens that llama.cpp's context holds."""
        return max(map(len, self.prompts)) + self.tokens + 64

    def calls(self) -> list[tuple[str, str]]:
        """Return every contestant with every mode of it."""
        own = [(name, mode) for name in self.ours for mode in (PLAIN, *self.policies)]
        return [*((PEER, mode) for mode in self.modes), *own]

    def start(self) -> None:
        """Start the processes."""
        peer = {"file": str(self.file), "draft": self.draft and str(self.draft), "length": self.context}
        self.workers[PEER] = Worker("peer", threads=self.threads, **peer)
        for name, settings in self.ours.items():
            worker = self.workers[name] = Worker("ours", threads=self.threads, **settings)
            if reason := worker.ask("engine"):
                raise UserError(f"the CPU engine does not run {name}: {reason}")

    def stop(self) -> None:
        """End the processes."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def measure(plan: Plan, kept: Kept) -> None:
    """Measure everything of a plan that is not kept yet."""
    todo = [key for key, _ in _parts(plan) if key not in kept]
    if not todo or not kept.need(todo[0]):
        return
    try:
        plan.start()
        _choose(plan, kept)
        for name in plan.ours:
            plan.workers[name].ask("warm", prompt=plan.prompts[0][:64])
        for name, mode in plan.calls():
            _call(plan, name, mode, plan.prompts[0], None)
        for key, part in _parts(plan):
            if kept.need(key):
                kept.put(key, _quietly(plan, partial(_turn, plan, part) if part else partial(_widths, plan)))
                say(f"{plan.key}: {key.rpartition('/')[2]}")
    finally:
        plan.stop()


def _quietly(plan: Plan, job: Callable[[], Any]) -> dict[str, Any]:
    """Do something, again if others were busy meanwhile; return what it gives, and the cores that they took."""

    def used() -> tuple[float, float]:
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
        all_ = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return all_ - sum(w.cpu_seconds() for w in plan.workers.values()) - sum(os.times()[:2]), perf_counter()

    for _ in range(ATTEMPTS):
        (before, began), found, (after, ended) = used(), job(), used()
        if plan.busy or (others := (after - before) / (ended - began)) <= QUIET:
            break
        say(f"{plan.key}: others took {others:.2f} cores")
    return {"found": found, "others": None if plan.busy else others}


def _parts(plan: Plan) -> Iterator[tuple[str, int | None]]:
    """Yield the keys of what is measured, with the number of the prompt if it is one."""
    yield f"{plan.key}/forwards", None
    who = ", ".join(f"{name} {mode}" for name, mode in plan.calls())
    for number in range(1, len(plan.prompts)):
        yield f"{plan.key}/{plan.tokens} tokens of {who}/prompt {number}", number


def _choose(plan: Plan, kept: Kept) -> None:
    """Set llama.cpp to the threads and the attention with which it decodes quickest here."""
    key, peer = f"{plan.key}/chosen", plan.workers[PEER]
    if key not in kept:
        trials = [(threads, flash) for threads in sorted({1, plan.threads}) for flash in (False, True)]
        rates = _quietly(plan, partial(_trials, plan, trials))["found"]
        best = max(trials, key=lambda trial: sorted(rates[trial])[TRIALS // 2])
        kept.put(key, {"threads": best[0], "flash": best[1], **peer.ask("about")})
        say(f"{key}: {best[0]} threads, flash attention {'on' if best[1] else 'off'}")
    chosen = kept.found[key]
    peer.ask("set", threads=chosen["threads"], flash=chosen["flash"])


def _trials(plan: Plan, trials: Sequence[tuple[int, bool]]) -> dict[tuple[int, bool], list[float]]:
    """Return llama.cpp's tokens per second by threads and attention, taken in turns."""
    peer, rates = plan.workers[PEER], {trial: list[float]() for trial in trials}
    for _ in range(TRIALS):
        for threads, flash in trials:
            peer.ask("set", threads=threads, flash=flash)
            peer.ask("generate", prompt=plan.prompts[0], tokens=8, mode=PLAIN)
            out = peer.ask("generate", prompt=plan.prompts[0], tokens=TRIAL_TOKENS, mode=PLAIN)
            rates[threads, flash].append(out["decoded"] / out["seconds"])
    return rates


def _call(plan: Plan, name: str, mode: str, prompt: list[int], text: list[int] | None) -> dict[str, Any]:
    """Let a contestant decode a prompt."""
    sleep(PAUSE)
    if mode.startswith("perfect") and text is None:
        text = plan.workers[name].ask("generate", prompt=prompt, tokens=plan.tokens, mode=PLAIN)["tokens"]
        sleep(PAUSE)
    found: dict[str, Any] = plan.workers[name].ask("generate", prompt=prompt, tokens=plan.tokens, mode=mode, text=text)
    return found


def _turn(plan: Plan, number: int) -> list[dict[str, Any]]:
    """Let all decode a prompt, each time another first; plain decoding goes before a perfect draft."""
    calls, found = plan.calls(), list[dict[str, Any]]()
    at = number % len(calls)
    said = dict[str, list[int]]()
    for name, mode in [*calls[at:], *calls[:at]]:
        out = _call(plan, name, mode, plan.prompts[number], said.get(name))
        if mode == PLAIN:
            said[name] = out["tokens"]
        found.append({"name": name, "mode": mode, "prompt": len(plan.prompts[number]), **out})
    return found


def _widths(plan: Plan) -> dict[str, dict[str, list[float]]]:
    """Return seconds of forwards by contestant and width."""
    found = {name: {str(width): list[float]() for width in WIDTHS} for name in plan.workers}
    for number in range(plan.rounds):
        at = number % len(WIDTHS)
        for width in (*WIDTHS[at:], *WIDTHS[:at]):
            for name, by_width in found.items():
                sleep(PAUSE)
                asked = {"prompt": plan.prompts[0], "width": width, "repeats": UNCOUNTED + FORWARDS}
                by_width[str(width)] += plan.workers[name].ask("forwards", **asked)[UNCOUNTED:]
    return found
