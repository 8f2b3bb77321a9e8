"""What every command shares: errors that a user can put right become one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from speckv_online.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
#: Libraries that few commands need, by module: what to install where one is missing.
LIBRARIES = {"bitsandbytes": "bitsandbytes", "matplotlib": "matplotlib", "ray": "ray[default]", "river": "river"}


def run_command(prog: str, command: Callable[[], Any]) -> int:
    """Run a command and return its exit code.

    A :class:`UserError`, a policy error or an error of the operating system (a missing file, a full disk) is printed as
    one line on standard error and gives exit code 2. Anything else is a bug of ours and keeps its traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (>&-): what is shown goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and not str(sys.stdout.encoding).lower().startswith("utf"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters shows ? for them
    try:
        code = command()
        sys.stdout.flush()
        return int(code or 0)
    except BrokenPipeError:
        return 0  # the reader (head, less) has gone: stop quietly
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print(f"{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        with contextlib.suppress(OSError):  # where standard error goes may be full
            print(f"{prog}: error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)


def _let_go(stream: Any) -> None:
    """Flush a stream; one that cannot be written is not tried again at exit, where that would change the exit code."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):  # a stream without a file of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print a line on standard error, where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(text: str, every: float = 5.0, show: Callable[[str], None] = say) -> Iterator[None]:
    """While the body runs, say every so many seconds that it still does, and for how long."""
    started = time.monotonic()
    with repeating(lambda: show(f"{text} ({time.monotonic() - started:.0f} s)"), every):
        yield


@contextlib.contextmanager
def repeating(call: Callable[[], None], every: float) -> Iterator[None]:
    """While the body runs, call something every so many seconds, in a thread."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(every):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def split_specs(text: str) -> tuple[str, ...]:
    """Split a comma-separated list whose items may hold commas themselves, as in ``fixed:4,online:seed=3,strength=9``.

    A piece that has a ``=`` but no ``:`` before it is one more option of the item to its left.

    >>> split_specs("fixed:4,online:seed=3,strength=9")
    ('fixed:4', 'online:seed=3,strength=9')
    """
    items: list[str] = []
    for piece in (p.strip() for p in text.split(",")):
        if items and "=" in piece and ":" not in piece.split("=")[0] and ":" in items[-1]:
            items[-1] += f",{piece}"
        elif piece:
            items.append(piece)
    return tuple(items)


def user_message(error: BaseException) -> str | None:
    """Return the line to show for an error that a user can put right, None for every other error."""
    remote = getattr(error, "cause", None)  # Ray wraps what an actor raises, and its text holds a traceback
    if isinstance(remote, BaseException):
        return user_message(remote)
    base = sys.modules.get("policies.base")  # never imported here: `speckv --help` has to be instant
    kinds = (UserError, *([base.PolicyError] if base is not None else []))
    if isinstance(error, kinds):
        return _one_line(str(error))
    if isinstance(error, ModuleNotFoundError):
        library = LIBRARIES.get(str(error.name).partition(".")[0])
        return library and f"this needs {library.partition('[')[0]}, which is not installed: pip install '{library}'"
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return _one_line(f"{error.strerror or error}{where}")
    if isinstance(error, RuntimeError) and str(error).startswith("Could not determine home"):  # pathlib, of ~NAME
        return "a path starts with ~ and a user that is not known here: write the folder out"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "unknown error"
