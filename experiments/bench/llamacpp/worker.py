"""Engines in processes of their own: each answers questions, one line of JSON after the other.

Nothing heavy is imported here: what an engine's process takes is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from experiments.common.process_memory import memory_of
from speckv_online.errors import UserError


class Worker:
    """An engine's process, and what it answers.

    Parameters
    ----------
    module : str
        Its module, of this folder.
    **settings
        What the engine is made with.

    Attributes
    ----------
    start_seconds : float
        From the start of the process until the engine was there.
    """

    def __init__(self, module: str, **settings: Any) -> None:
        started = perf_counter()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.bench.llamacpp.{module}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self._in: IO[str] = self._process.stdin  # type: ignore[assignment]
        self._out: IO[str] = self._process.stdout  # type: ignore[assignment]
        try:
            self.ask("make", **settings)
        except BaseException:
            self.close()
            raise
        self.start_seconds = perf_counter() - started

    def ask(self, what: str, **arguments: Any) -> Any:
        """Return the answer; raises :class:`UserError` with the engine's own line where there is none."""
        try:
            self._in.write(json.dumps({"what": what, **arguments}) + "\n")
            self._in.flush()
        except BrokenPipeError:
            pass
        answer = json.loads(self._out.readline() or "{}")
        if "answer" in answer:
            return answer["answer"]
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines() or ["it ended without a word"]
        raise UserError(answer.get("error") or f"an engine's process failed: {said[-1][:300]}")

    def memory(self) -> dict[str, int]:
        """Return the bytes that the process has in memory: now, at its peak, and without what files map."""
        if not (found := memory_of(self._process.pid)):
            raise UserError("the memory of a process cannot be read: it has ended")
        return found

    def cpu_seconds(self) -> float:
        """Return the processor's time that the process has had."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for file in (self._in, self._out, self._errors):
            file.close()


def serve(make: Callable[..., Any]) -> None:
    """Answer what standard input asks, until it ends: first ``make``, then methods of what was made."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    engine: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if (what := asked.pop("what")) == "make":
                engine, answer = make(**asked), None
            else:
                answer = getattr(engine, what)(**asked)
            reply = {"answer": answer}
        except UserError as e:
            reply = {"error": str(e)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
