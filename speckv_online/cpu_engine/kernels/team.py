"""How many threads the kernels run on: as many as pay beside what else keeps the cores busy.

All threads of a team wait for the slowest. One that shares its core with another busy process keeps the others waiting
at every barrier, so that a team of all cores is slower than one of the cores that are free. A row of a product is
always summed in the same order, so that the number of threads changes no bit of what comes out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from time import perf_counter, process_time

import torch

#: Seconds between two looks at what the cores do.
EVERY = 0.2
#: A team of c threads on free cores is c to the power of this as quick as one thread (two: 1.62, found on an EPYC).
SCALING = 0.7
_STAT = Path("/proc/stat")
#: Columns of a core's line in ``/proc/stat`` that are busy: user, nice, system, irq, softirq.
_BUSY = (1, 2, 3, 6, 7)


def worth(threads: int, free: float) -> float:
    """Return how quick a team is, in that of one thread on a free core.

    Parameters
    ----------
    threads : int
    free : float
        Cores that others leave free. What they take of the team's last core, the whole team waits for.
    """
    return float(threads**SCALING * max(1.0 - max(threads - free, 0.0), 0.0))


def best_size(most: int, cores: int, others: float) -> int:
    """Return how many threads are quickest, 1 to ``most``, if others keep so many of the cores busy."""
    sizes = range(1, max(min(most, cores), 1) + 1)
    return max(sizes, key=lambda threads: (worth(threads, cores - others), -threads))


class Cores:
    """What keeps the cores busy that this process may run on, as the system counts it.

    Parameters
    ----------
    stat : Path
        The system's counts, as Linux has them. Where there are none, all cores pass for free.
    own : callable
        Returns the seconds that this process has had.
    """

    def __init__(self, stat: Path = _STAT, own: Callable[[], float] = process_time) -> None:
        self._stat, self._own = stat, own
        self.count = len(self._allowed()) or os.cpu_count() or 1
        self._tick = 1.0 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01

    def others(self) -> float:
        """Return the seconds that other processes have had of these cores since the machine started."""
        allowed = self._allowed()
        self.count = len(allowed) or self.count
        ticks = 0
        try:
            for line in self._stat.read_text().splitlines():
                name, *_ = found = line.split()
                if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in allowed:
                    ticks += sum(int(found[column]) for column in _BUSY)
        except (OSError, ValueError, IndexError):
            return 0.0
        return ticks * self._tick - self._own()

    @staticmethod
    def _allowed() -> set[int]:
        return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


class Team:
    """Chooses the number of threads again and again.

    Parameters
    ----------
    cores : Cores, optional
    clock : callable
        Returns seconds.

    Attributes
    ----------
    now : int
        The number, as of the latest call of :meth:`size`.
    fixed : int, optional
        A number to keep to instead.
    """

    def __init__(self, cores: Cores | None = None, clock: Callable[[], float] = perf_counter) -> None:
        self.fixed: int | None = None
        self._cores, self._clock, self._lock = cores or Cores(), clock, Lock()
        self.now, self._most, self._next, self._before, self._at = 1, 0, 0.0, 0.0, 0.0

    def size(self) -> int:
        """Return the number of threads for now: at most torch's."""
        if self.fixed is not None:
            self.now = min(self.fixed, torch.get_num_threads())
            return self.now
        most, now = torch.get_num_threads(), self._clock()
        if most != self._most or now >= self._next:
            self._look(most, now)
        return self.now

    def _look(self, most: int, now: float) -> None:
        with self._lock:
            if most != self._most:
                self._most = self.now = most
            elif now < self._next:
                return  # another thread has looked meanwhile
            if most == 1:
                self._next = now + EVERY
                return
            others, passed = self._cores.others(), now - self._at
            # After a pause, most of what passed says nothing of now.
            if 0.0 < passed < 5 * EVERY:
                self.now = best_size(most, self._cores.count, max(others - self._before, 0.0) / passed)
            self._before, self._at, self._next = others, now, now + EVERY


#: The team of this process.
TEAM = Team()
