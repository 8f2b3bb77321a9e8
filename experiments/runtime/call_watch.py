"""Which policy is being called right now, noted where the end of the process does not erase it; and a limit on calls.

A policy may end its process (``os._exit``, a crash of native code) or never come back. The note then says which one
it was. It lies in shared memory, so that it takes no system call and no place on a disk that may be full.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from speckv_online.console import EXIT_USER_ERROR
from speckv_online.errors import UserError

#: What may be called, by its number in a note; 0: nothing is.
NAMES = (
    "", "begin", "decide", "proceed", "submit", "learn", "pmf", "state_dict", "load_state_dict", "take_delta", "merge",
    "info", "set_costs", "its constructor",
)  # fmt: skip
_CODES = {name: code for code, name in enumerate(NAMES)}
#: Number of the call's name, whether it took too long, and which call it is.
_HEAD = struct.Struct("<BBI")
#: The policy and what it is called for; then the ends of processes that the note outlived. Both are JSON and a newline.
_ABOUT, _ENDED, _SIZE = 16, 4096, 8192
#: Times that a late call is interrupted, a second apart, before its process is ended.
TRIES = 3


class PolicyCall(NamedTuple):
    """A call of a policy that was not over when the note was read."""

    policy: str
    where: str
    name: str
    number: int = 0
    late: bool = False

    def reason(self, limit: float) -> str:
        """Return what the policy did, if its process has ended in this call or had to be ended."""
        what = f"did not come back within {limit:g} s" if self.late else "ended its process"
        return f"{self.name} {what} ({self.where})"


class PolicyGivenUp(UserError):
    """A policy cannot go on; others can."""

    def __init__(self, policy: str, reason: str) -> None:
        super().__init__(policy, reason)
        self.policy, self.reason = policy, reason

    def __str__(self) -> str:
        return f"policy {self.policy} was given up: {self.reason}"


class LateCall(BaseException):
    """Raised inside a policy's call that takes too long. No policy should catch it, so it is no ``Exception``."""


def note_path(*names: object) -> Path:
    """Return where the note of that name lies on this machine."""
    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"speckv-call-{hashlib.sha256('/'.join(map(str, names)).encode()).hexdigest()[:32]}"


def read_note(path: Path) -> PolicyCall | None:
    """Return the call that a process of the same user was in, or is; None if it is in none, or there is no note."""
    data = _read(path)
    code, late, number = _HEAD.unpack_from(data)
    if not 0 < code < len(NAMES):
        return None
    about = _json_at(data, _ABOUT)
    if not isinstance(about, list) or len(about) != 2:
        return None
    return PolicyCall(str(about[0]), str(about[1]), NAMES[code], number, bool(late))


def forget_note(path: Path) -> None:
    """Remove a note, if it is there."""
    with contextlib.suppress(OSError):
        path.unlink()


def _read(path: Path) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            if not hasattr(os, "getuid") or os.fstat(fd).st_uid == os.getuid():
                data = os.read(fd, _SIZE)
        finally:
            os.close(fd)
    return data.ljust(_SIZE, b"\0")


def _json_at(data: bytes, start: int) -> Any:
    text = data[start : data.find(b"\n", start)]
    try:
        return json.loads(text)
    except ValueError:
        return None


class CallWatch:
    """Notes calls of policies, and ends those that take too long; use it as a context manager.

    A thread looks at the call at hand. If it is late, :class:`LateCall` is raised in it, if it runs in the main thread
    and in Python. If that does not help, the process is ended; the note says why.

    Parameters
    ----------
    path : Path or None
        Of the note, see :func:`note_path`; None to keep it in this process.
    limit : float
        Seconds that a call may take.
    interrupts : bool
        Whether calls run in the main thread.
    outlived : bool
        Take a note that is there for one of an earlier process of the same kind, and keep what it says in
        :attr:`ended`. Otherwise it is overwritten.

    Attributes
    ----------
    ended : list of PolicyCall
        Calls in which earlier processes ended.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> CallWatch:
        return self  # a copy of a policy is watched by the same

    def __init__(self, path: Path | None, limit: float, *, interrupts: bool = True, outlived: bool = False) -> None:
        self.path, self.limit = path, limit
        self.interrupts = interrupts and hasattr(signal, "pthread_kill")
        self.call, self.number, self.policy, self.where = "", 0, "", ""
        self.ended: list[PolicyCall] = []
        if outlived and path is not None:
            earlier, last = _json_at(_read(path), _ENDED), read_note(path)
            self.ended = [PolicyCall(*found) for found in earlier or []] + ([last] if last else [])
        self._map = self._open()
        self.keep(self.ended)
        self._done = threading.Event()
        self._former: Any = None

    def _open(self) -> mmap.mmap:
        if self.path is None:
            return mmap.mmap(-1, _SIZE)
        forget_note(self.path)
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
            try:
                os.write(fd, bytes(_SIZE))  # a page without memory behind it would end the process when written to
                return mmap.mmap(fd, _SIZE)
            finally:
                os.close(fd)
        except OSError:  # nowhere to put it: the limit still holds
            return mmap.mmap(-1, _SIZE)

    def keep(self, ended: list[PolicyCall]) -> None:
        """Note in which calls earlier processes ended, for the next one to know."""
        self.ended = ended
        self._put(_ENDED, ended)

    def _put(self, start: int, value: Any) -> None:
        data = json.dumps(value).encode() + b"\n"
        if len(data) <= _ENDED - _ABOUT:
            self._map[start : start + len(data)] = data

    def __enter__(self) -> CallWatch:
        self.interrupts = self.interrupts and threading.current_thread() is threading.main_thread()
        if self.interrupts:
            self._former = signal.signal(signal.SIGALRM, self._interrupt)
        threading.Thread(target=self._look, name="call watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self.interrupts:
            signal.signal(signal.SIGALRM, self._former or signal.SIG_DFL)
        if self.path is not None:
            forget_note(self.path)

    def about(self, policy: str, where: str) -> None:
        """Say whose calls come next, and what for."""
        self.policy, self.where = policy, where
        self._put(_ABOUT, [policy, where])

    def enter(self, name: str) -> None:
        """A call begins."""
        self.number = number = (self.number + 1) & 0xFFFFFFFF
        _HEAD.pack_into(self._map, 0, _CODES[name], 0, number)
        self.call = name

    def leave(self) -> None:
        """The call is over."""
        self.call = ""
        self._map[0] = 0

    @contextlib.contextmanager
    def calling(self, name: str) -> Iterator[None]:
        """Note that the body is a call."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def at_hand(self, name: str = "", *, late: bool = False) -> PolicyCall:
        """Return the call at hand as it would be read, or one of the given name."""
        return PolicyCall(self.policy, self.where, name or self.call, self.number, late)

    def _interrupt(self, signum: int, frame: object) -> None:
        if self.call:
            raise LateCall(self.call)

    def _look(self) -> None:
        seen, since, tries = -1, 0.0, 0
        while not self._done.wait(min(self.limit / 8, 1.0)):
            number = self.number if self.call else -1
            if number < 0 or number != seen:
                seen, since, tries = number, time.monotonic(), 0
            elif time.monotonic() - since > self.limit + tries:
                self._map[1] = 1
                if self.interrupts and tries < TRIES:
                    tries += 1
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                elif self.call:
                    text = self.at_hand(late=True).reason(self.limit)
                    with contextlib.suppress(OSError):
                        print(f"policy {self.policy}: {text}, so the process is ended", file=sys.stderr, flush=True)
                    os._exit(EXIT_USER_ERROR)
