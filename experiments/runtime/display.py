"""Progress of a run on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from experiments.runtime.settings import CompareConfig
from speckv_online.console import repeating

#: Seconds between two notes on what still loads.
EVERY = 5.0

if TYPE_CHECKING:
    from experiments.runtime.work_queue import Event


class Display:
    """Shows what happens; use it as a context manager.

    Parameters
    ----------
    config : CompareConfig
        Settings of the run.
    prompts : int
        Number of prompts.
    """

    def __init__(self, config: CompareConfig, prompts: int) -> None:
        self.total = prompts * len(config.policies) * config.orders
        self.levels = config.levels
        self.started = time.monotonic()
        self.bars = None
        # (level, worker) -> since when it loads. Loading may take a minute: something has to move meanwhile.
        self.loading: dict[tuple[str, int], float] = {}
        self.waits = contextlib.ExitStack()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.fields[level]:>5}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
            self.bars = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            add = self.bars.add_task
            self.tasks = {level: add("waiting", total=self.total, level=level, start=False) for level in self.levels}

    def __enter__(self) -> Display:
        # Libraries' own notes would tear the bars apart; warnings are still shown.
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
        if self.bars is not None:
            self.bars.start()
        self.waits.enter_context(repeating(self.tell_loading, EVERY))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.waits.close()
        if self.bars is not None:
            self.bars.stop()

    def say(self, text: str) -> None:
        """Show a line."""
        if self.bars is not None:
            self.bars.console.print(text)
            return
        try:
            print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # a log on a full disk does not end a run
            pass

    def tell_loading(self) -> None:
        """Say which workers still load, and for how long."""
        for (level, worker), since in list(self.loading.items()):
            text = f"worker {worker} still loads ({time.monotonic() - since:.0f} s)"
            if self.bars is not None:
                self.bars.update(self.tasks[level], description=text)
            else:
                self.say(f"{level} {text}")

    def show(self, event: Event) -> None:
        """Show an event of the run."""
        if not event.level:  # of no level's workers
            self.say(event.text)
            return
        if event.kind == "loading":
            self.loading[event.level, event.worker] = time.monotonic()
        else:  # whatever else a worker has to tell, it loads no more
            self.loading.pop((event.level, event.worker), None)
        if event.kind == "waiting":
            text = f"worker {event.worker} waits for free cores"
        elif event.kind == "loading":
            text = f"worker {event.worker} loads, warms up and calibrates"
            if self.bars is not None:
                self.bars.start_task(self.tasks[event.level])
        elif event.kind == "ready":
            text = f"ready: {(event.facts or {}).get('arithmetic', '')}"
        elif event.kind == "finished":
            text = f"worker {event.worker} finished"
        elif event.kind in ("failed", "trouble", "given up"):
            text = f"failed: {event.text}" if event.kind == "failed" else event.text
        elif event.progress is not None:
            p = event.progress
            text = f"{p.unit.policy} on {p.unit.prompt}: {p.tokens} tokens, {p.tokens / p.seconds:.1f} tokens/s"
            if self.bars is not None:
                self.bars.update(self.tasks[event.level], completed=p.done)
            else:
                text = f"{p.done}/{p.total} {text}"
        if self.bars is not None:
            self.bars.update(self.tasks[event.level], description=text)
        else:
            self.say(f"{event.level} {text}")
