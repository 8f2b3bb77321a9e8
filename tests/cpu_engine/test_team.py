"""How many threads the kernels run on: what is chosen beside how much company, and that no bit depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from speckv_online.cpu_engine.kernels import llvm
from speckv_online.cpu_engine.kernels.team import EVERY, TEAM, Cores, Team, best_size
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.models.pairs import LoadedPair


@pytest.mark.parametrize(
    ("most", "cores", "others", "best"),
    [
        (2, 2, 0.0, 2), (2, 2, 0.2, 2), (2, 2, 0.5, 1), (2, 2, 1.0, 1), (2, 2, 1.6, 1), (2, 2, 2.0, 1), (1, 2, 0.0, 1),
        (16, 16, 0.0, 16), (16, 16, 1.0, 15), (16, 16, 0.1, 15), (16, 16, 12.0, 4), (8, 16, 4.0, 8), (16, 2, 0.0, 2),
    ],
)  # fmt: skip
def test_the_quickest_size(most: int, cores: int, others: float, best: int) -> None:
    assert best_size(most, cores, others) == best


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Clockwork:
    """A clock, and the counts of a machine at its times, written as the system writes them."""

    def __init__(self, folder: Path) -> None:
        self.file, self.ticks, self.time = folder / "stat", 0.0, 100.0
        self.core = min(os.sched_getaffinity(0))

    def team(self) -> Team:
        return Team(Cores(self.file, own=lambda: 0.0), clock=lambda: self.time)

    def wait(self, busy: float, seconds: float = 1.1 * EVERY) -> None:
        """Let time pass in which others keep so many cores busy."""
        self.time += seconds
        self.ticks += busy * seconds * os.sysconf("SC_CLK_TCK")
        self.file.write_text(f"cpu  1 2 3\ncpu{self.core} {round(self.ticks)} 0 0 500 7 0 0 9 0 0\nintr 5\n")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_company_comes_and_goes(tmp_path: Path, two_threads: None) -> None:
    clock = Clockwork(tmp_path)
    clock.wait(0.0)
    team, cores, found = clock.team(), len(os.sched_getaffinity(0)), []
    assert team.size() == 2
    for busy in (0.0, float(cores - 1), float(cores), 0.0, 0.0):
        clock.wait(busy)
        found.append(team.size())
    assert found == [2, 1, 1, 2, 2]
    clock.wait(float(cores), seconds=60.0)  # a minute without decoding says nothing of now
    assert team.size() == 2
    clock.wait(float(cores), seconds=0.5 * EVERY)
    assert team.size() == 2  # too early to look
    torch.set_num_threads(1)
    assert team.size() == 1


@pytest.mark.parametrize("text", [None, "", "cpu0 x y z\n", "cpu0 1 2\n"])
def test_a_system_that_tells_nothing_leaves_all_cores(tmp_path: Path, two_threads: None, text: str | None) -> None:
    clock = Clockwork(tmp_path)
    team = clock.team()
    for _ in range(3):
        clock.time += 1.1 * EVERY
        if text is not None:
            clock.file.write_text(text)
        assert team.size() == 2


def test_a_busy_process_is_seen() -> None:
    """The system's own counts: a busy process on our cores is others' time, our own loop is not."""
    cores = Cores()
    if not Path("/proc/stat").exists() or not cores.others():
        pytest.skip("the system counts nothing here")

    def during(seconds: float) -> float:
        before, start, n = cores.others(), time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            n += 1
        return cores.others() - before

    quiet = min(during(0.4) for _ in range(3))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.3)
        found = max(during(0.4) for _ in range(3))
        busy.kill()
    assert found > quiet
    assert found > 0.1


@pytest.mark.slow
def test_no_bit_depends_on_the_number(
    real_pair: LoadedPair, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    """Tokens and logits of a text whose forwards take turns between one thread and two, drafts included."""
    decoder = SpeculativeDecoder(real_pair.drafter, policy="fixed:3", target=real_pair.target)
    if not decoder.engine.on:
        pytest.skip("the engine does not run here")
    found = []
    for sizes in ([1], [2], [1, 2], [2, 2, 1]):
        calls = iter(range(10**9))
        monkeypatch.setattr(TEAM, "size", lambda sizes=sizes, calls=calls: sizes[next(calls) % len(sizes)])
        logits = list[torch.Tensor]()
        out = decoder.generate(
            [1, 5, 9, 200, 17], 24, eos_ids=(), on_logits=lambda rows, to=logits: to.append(rows.clone())
        )
        found.append((out.tokens, torch.cat(logits)))
    for tokens, rows in found[1:]:
        assert tokens == found[0][0]
        assert torch.equal(rows, found[0][1])
    assert llvm.TEAM is TEAM
