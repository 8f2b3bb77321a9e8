"""A vLLM server on loopback, from its start to its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from speckv_online.errors import UserError

ROOT = Path(__file__).parents[2]
#: Seconds that a server may take to start: compiling takes minutes.
PATIENCE = 900.0
#: Nothing is sent anywhere, and nothing is fetched.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
SCHEDULER, WORKER = "speckv_online.serving.vllm.PolicyScheduler", "speckv_online.serving.vllm_worker.LazyWorker"


def environment(gigabytes: int, threads: int = 0) -> dict[str, str]:
    """Return the environment of vLLM's processes; this project is on their path."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = os.environ | QUIET | {"VLLM_CPU_KVCACHE_SPACE": str(gigabytes), "PYTHONPATH": path}
    if threads:
        found |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    return found


class Server:
    """Starts ``vllm serve`` and waits until it answers.

    Parameters
    ----------
    python : str
        Interpreter that has vLLM.
    arguments : list of str
        Of the server, without its address.
    environment : dict
        See :func:`environment`.
    log : Path
        Where its output goes.
    """

    def __init__(self, python: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port: int = found.getsockname()[1]
        self.log, self._metrics = log, tempfile.TemporaryDirectory(prefix="speckv-metrics-")
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment | {"PROMETHEUS_MULTIPROC_DIR": self._metrics.name},
            )  # fmt: skip

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Wait until it answers; raises :class:`UserError` if it ends before that."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                lines = self.log.read_text(errors="replace").strip().splitlines()
                told = (
                    [line for line in lines if "Error" in line and "EngineCore" not in line] or lines or ["no output"]
                )
                raise UserError(f"the server ended at its start: {told[-1][-300:]} (see {self.log})")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise UserError(f"the server did not answer within {PATIENCE:.0f} s (see {self.log})")

    def counts(self) -> dict[str, float]:
        """Return the plug-in's counters of ``/metrics``, by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = (re.fullmatch(r"speckv:(\w+?)_total(\{.*\})? (\S+)", line) for line in lines)
        return {m[1] + (m[2] or ""): float(m[3]) for m in found if m}

    def stop(self) -> None:
        """End the server and all of its processes."""
        for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            if self.process.poll() is None:
                os.killpg(self.process.pid, sign)
                try:
                    self.process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
        self._metrics.cleanup()


class Client:
    """vLLM's own load generator, in a process that is started once."""

    def __init__(self, python: str, environment: dict[str, str], log: Path) -> None:
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("generator.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=file, text=True, env=environment,
            )  # fmt: skip
        self._log = log

    def run(self, arguments: list[str]) -> dict[str, Any]:
        """Play one block, and return what the generator measured."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return found
        raise UserError(f"the load generator ended (see {self._log})")

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def interpreter(given: str) -> str:
    """Return the interpreter that has vLLM; raises :class:`UserError` where it has none."""
    python = given or sys.executable
    program = "import vllm, vllm.v1.core.sched.scheduler; print(vllm.__version__)"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, env=os.environ | QUIET)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{python} has no vLLM that works ({last}): install the extra [vllm], and name it by --python")
    return python
