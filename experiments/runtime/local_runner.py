"""Runs workers and the learner in this process; :mod:`experiments.runtime.ray_runner` does the same with Ray actors."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator

from experiments.runtime.call_watch import CallWatch, forget_note, note_path, read_note
from experiments.runtime.learner import Learner
from experiments.runtime.work_queue import Event, Job
from experiments.runtime.worker import Failed, Worker
from speckv_online.console import user_message

log = logging.getLogger(__name__)


def run_local(job: Job, *, resumed: bool = False) -> Iterator[Event]:
    """Run the levels one after the other; a level that fails does not stop the others.

    Parameters
    ----------
    job : Job
    resumed : bool
        Whether the run was at work before. If it ended in a policy's call, that policy is tried once more: somebody may
        have killed the process. If it ends so again, at the next resume the policy is given up for that time. A policy
        whose call took too long is given up at once.
    """
    path = note_path(job.out)
    last = read_note(path) if resumed else None
    if last is None or last.policy not in job.config.policies:
        forget_note(path)
    with CallWatch(path, job.config.call_seconds, outlived=True) as watch:
        yield from _ended_in(job, watch)
        yield from _levels(job, watch)


def _ended_in(job: Job, watch: CallWatch) -> Iterator[Event]:
    """Judge the policy in whose call the run ended when it was last at work."""
    if not watch.ended:
        return
    last, limit = watch.ended[-1], job.config.call_seconds
    reason = f"{last.reason(limit)} when this run was last at work"
    if last.late or [call.policy for call in watch.ended[-2:]] == [last.policy] * 2:
        watch.keep([])
        yield from job.give_up("", 0, last.policy, reason)
        yield Event("", "trouble", text="its units are left out this time")
    else:
        watch.keep([last])
        yield Event("", "trouble", text=f"policy {last.policy}: {reason}; it is tried once more")


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
