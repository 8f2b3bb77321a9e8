"""Runs on a real Ray in which workers, the learner and the driver are killed while units are being decoded.

``python -m tests.support.kills --kills 50 --seed 0 --out FOLDER`` does it with a tiny random pair of many layers, so
that steps are slow, checks every run against an undisturbed one, and prints what was killed as JSON. Between two kills
the run gets on: ``--progress`` says by how many units at least.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.compare.__main__ import main as compare
from experiments.runtime.learner import checkpoint_name, read_checkpoint
from experiments.runtime.settings import CompareConfig
from speckv_online.io.prompts import Prompt
from speckv_online.io.run_directory import read_manifest, read_units
from tests.support.runs import COUNTER, ROOT, environment, flags, make_config, write_prompts
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama, tiny_tokenizer

#: Who is killed, and how often in comparison.
VICTIMS = {"WorkerActor": 5, "LearnerActor": 4, "Driver": 1}
LAYERS = 24


def start(config: CompareConfig, out: Path, cores: set[int] | None = None, **env: str) -> subprocess.Popen[str]:
    """Start a run in a process of its own, or go on with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.compare", *flags(config, "--out", out)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(**env), start_new_session=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
    )  # fmt: skip


def actors(job: int, kind: str) -> list[int]:
    """Process ids of the actors of a class, or of those in a method of it, that descend from a process."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_text()
            except OSError:
                continue  # it has just ended
    found = []
    for pid, title in titles.items():
        if title.startswith(f"ray::{kind}"):
            above = pid
            while above in parents and above != job:
                above = parents[above]
            found += [pid] if above == job else []
    return found


def kill(pid: int) -> bool:
    """Kill a process; return False if it has just ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def slow_pair(folder: Path) -> TinyPair:
    """A pair whose steps take some ten times as long as those of the tiny pair."""
    target = tiny_llama(layers=LAYERS)
    draft = perturbed(target, 0.01)
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return TinyPair(folder / "target", folder / "draft", target, draft, tiny_tokenizer())


def settings(folder: Path, prompts: int, tokens: int) -> CompareConfig:
    """A run with two workers of one level: every prompt under a fixed policy and one that counts what it learns."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [Prompt(f"p{i}", "chat", f"hello {i}") for i in range(prompts)]
    file = write_prompts(folder / "prompts.jsonl", texts)
    return make_config(
        slow_pair(folder / "pair"), levels=("fp32",), policies=("fixed:3", COUNTER), prompts=str(file), workers=2,
        sync_every=3, max_new_tokens=tokens, local=False,
    )  # fmt: skip


class Killer:
    """Kills in a run until it has finished; the driver is started again.

    Parameters
    ----------
    config : CompareConfig
        Settings of the run.
    run : Path
        Its directory.
    rng : random.Random
        Chooses victims and moments.
    progress : int
        Units that are recorded between two kills, at least.
    """

    def __init__(self, config: CompareConfig, run: Path, rng: random.Random, progress: int = 1) -> None:
        self.config, self.run, self.rng, self.progress = config, run, rng, progress
        self.killed: Counter[str] = Counter()
        #: Units that were recorded by each kill.
        self.recorded: list[int] = []
        self.incomplete = 0
        self.shown: list[str] = []

    def work(self, most: int) -> None:
        """Kill up to so many processes, each while at least one unit is being decoded."""
        while True:
            job = start(self.config, self.run)
            reader = threading.Thread(target=self._read, args=(job,), daemon=True)
            reader.start()
            try:
                while self.killed.total() < most and job.poll() is None:
                    self._kill_one(job)
                code = job.wait(600)
            finally:
                job.kill()
            reader.join(60)
            if code == 0:
                return
            # A worker that dies three times in a row is not replaced; everything else goes on by itself.
            assert code in (1, 2, -signal.SIGKILL), (code, self.shown[-40:])
            self.incomplete += code > 0

    def _read(self, job: subprocess.Popen[str]) -> None:
        assert job.stderr is not None
        self.shown += job.stderr

    def _done(self) -> int:
        return sum(file.read_bytes().count(b'"done":') for file in self.run.glob("steps-*.jsonl"))

    def _kill_one(self, job: subprocess.Popen[str]) -> None:
        kind = self.rng.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        delay, pick = self.rng.uniform(0.0, 3.0), self.rng.random()
        more = self.progress + self.rng.choice((0, 0, 1))
        goal = self.recorded[-1] + more if self.recorded else 0
        while job.poll() is None and self._done() < goal:
            time.sleep(0.05)
        time.sleep(delay)
        while job.poll() is None:
            busy = actors(job.pid, "WorkerActor.decode")
            pids = {"WorkerActor": busy, "Driver": [job.pid]}.get(kind) or actors(job.pid, kind)
            if busy and pids:
                recorded = self._done()
                if not kill(pids[int(pick * len(pids))]):
                    continue
                self.recorded.append(recorded)
                self.killed[kind] += 1
                print(f"killed the {kind} at {recorded} units", file=sys.stderr, flush=True)
                if kind == "Driver":
                    job.wait(60)
                return
            time.sleep(0.02)


def check(run: Path, whole: Path, policy: str = COUNTER) -> None:
    """The run has every record of the undisturbed one exactly once, and has learnt the same."""
    rows = [json.loads(line) for file in sorted(run.glob("steps-*.jsonl")) for line in file.read_text().splitlines()]
    units = [tuple(row["done"].values()) for row in rows if "done" in row]
    steps = [(row["level"], row["policy"], row["prompt"], row["seed"], row["step"]) for row in rows if "step" in row]
    results, expected = read_units(run), read_units(whole)
    assert len(units) == len(set(units)) == len(results) == len(expected)
    assert len(steps) == len(set(steps)) == sum(len(r.steps) for r in results)
    assert {r.unit.key: r.facts["output"] for r in results} == {r.unit.key: r.facts["output"] for r in expected}
    state, batches = read_checkpoint(run / checkpoint_name((policy, 0)))
    reference, names = read_checkpoint(whole / checkpoint_name((policy, 0)))
    tokens = sum(r.tokens for r in results if r.unit.policy == policy)
    assert float(state["total"]) == float(reference["total"]) == tokens
    assert sorted(batches) == sorted(names)
    manifest = read_manifest(run)
    assert (manifest["status"], manifest["given_up"]) == ("finished", {})


def kill_runs(
    folder: Path, kills: int, seed: int, prompts: int = 16, tokens: int = 32, progress: int = 1
) -> dict[str, Any]:
    """Kill so many processes, in as many runs as it takes; check each run and return what was killed."""
    config, rng = settings(folder, prompts, tokens), random.Random(seed)
    whole = folder / "whole"
    assert compare(flags(replace(config, local=True), "--out", whole)) == 0
    killed: Counter[str] = Counter()
    runs = incomplete = 0
    while killed.total() < kills:
        killer = Killer(config, folder / f"run{runs}", rng, progress)
        killer.work(kills - killed.total())
        assert not any("Traceback" in line for line in killer.shown), killer.shown
        check(killer.run, whole)
        assert all(b - a >= progress for a, b in pairwise(killer.recorded)), killer.recorded
        killed += killer.killed
        runs, incomplete = runs + 1, incomplete + killer.incomplete
        print(f"run {runs}: {dict(killer.killed)}, checked", file=sys.stderr, flush=True)
    return {"kills": dict(killed), "runs": runs, "resumed as incomplete": incomplete, "units": 2 * prompts * runs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", type=int, default=1, help="units recorded between two kills, at least")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    print(json.dumps(kill_runs(given.out, given.kills, given.seed, progress=given.progress)))
