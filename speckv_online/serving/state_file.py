"""The state of a server's policy: one file, written whole or not at all, and read without pickle."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from policies.base import Policy, PolicyError, State, reason
from speckv_online.errors import UserError
from speckv_online.io.run_directory import load_arrays, save_arrays

log = logging.getLogger(__name__)
#: Name of the array that says what the state is of.
ABOUT = "about"
#: Seconds between writes.
EVERY = 10.0


class StateFile:
    """Reads a policy's state at the start, and writes it now and then.

    A state of other models, or a damaged one, is set aside; a file that cannot be written is named once. Neither stops
    the server.

    Parameters
    ----------
    path : str
        Empty for no file.
    about : mapping of str to str
        What the state is of: the policy, the models, how they are stored.
    """

    def __init__(self, path: str, about: Mapping[str, str]) -> None:
        self.path = Path(path) if path else None
        self._about = json.dumps(dict(about), sort_keys=True)
        self._saved = time.monotonic()
        self._writing: threading.Thread | None = None

    def load(self, policy: Policy) -> bool:
        """Have a policy start from the file; return whether it did."""
        if self.path is None or not self.path.exists():
            return False
        try:
            state = load_arrays(self.path)
            about = bytes(state.pop(ABOUT, np.zeros(0, np.uint8))).decode(errors="replace")
            if about != self._about:
                raise PolicyError(f"it is of {about or 'something else'}, not of {self._about}")
            policy.load_state_dict(state)
            return True
        except (UserError, PolicyError) as error:
            aside = self.path.with_name(f"{self.path.name}.aside")
            log.warning("the state %s is not used, and moved to %s: %s", self.path, aside.name, reason(error))
            try:
                self.path.replace(aside)
            except OSError as problem:
                self._give_up(problem)
            return False

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.path is not None and time.monotonic() - self._saved >= EVERY

    def save(self, state: State, wait: bool = False) -> None:
        """Write a state, in a thread of its own unless ``wait``."""
        self._saved = time.monotonic()
        if self._writing is not None:
            self._writing.join()
        if self.path is None or not state:
            return
        whole = state | {ABOUT: np.frombuffer(self._about.encode(), np.uint8)}
        self._writing = threading.Thread(target=self._write, args=(self.path, whole))
        self._writing.start()
        if wait:
            self._writing.join()

    def _write(self, path: Path, state: State) -> None:
        try:
            save_arrays(path, state)
        except UserError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.path = None
        log.warning("nothing more of what is learnt is kept: %s", reason(error))
