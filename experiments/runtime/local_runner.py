"""Runs workers and the learner in this process; :mod:`experiments.runtime.ray_runner` does the same with Ray actors."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator

from experiments.runtime.call_watch import CallWatch, note_path
from experiments.runtime.learner import Learner
from experiments.runtime.work_queue import Event, Job
from experiments.runtime.worker import Failed, Worker
from speckv_online.console import user_message

log = logging.getLogger(__name__)


def run_local(job: Job) -> Iterator[Event]:
    """Run the levels one after the other; a level that fails does not stop the others."""
    watch = CallWatch(note_path(job.out), job.config.call_seconds)
    with watch:
        yield from _levels(job, watch)


def _levels(job: Job, watch: CallWatch) -> Iterator[Event]:
    learner = Learner(job.out, watch)
    for level in job.config.levels:
        worker = None
        try:
            work = job.work(level)
            if not work.left:
                continue
            yield Event(level, "loading")
            worker = Worker(job.config, level, 0, job.schedule.shares[level].threads, job.prompts, learner.sync, watch)
            yield Event(level, "ready", facts=worker.load())
            while units := work.take():
                for unit, prompt in units:
                    done = worker.decode(unit, prompt)
                    if isinstance(done, Failed):
                        yield from job.give_up(level, 0, unit.policy, done.reason)
                        continue
                    progress = work.record(unit, done.steps, done.facts, done.seconds)
                    yield Event(level, "unit", progress=progress)
            yield Event(level, "finished", facts=worker.finish())
        except Exception as error:
            yield failure(level, error)
            let_go(error)
        del worker
        gc.collect()  # the models of one level go before those of the next come


def let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error hold, such as models; the error can still be printed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def failure(level: str, error: BaseException) -> Event:
    """Return the event of a level that cannot go on; an error that is no user's mistake is logged in full."""
    text = user_message(error)
    if text is None:
        log.error("%s failed", level, exc_info=error)
        cause = getattr(error, "cause", None) or error
        text = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
    return Event(level, "failed", text=text, error=error)
