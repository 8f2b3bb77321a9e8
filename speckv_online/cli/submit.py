"""``speckv submit``: run a comparison as a job on a Ray cluster, follow it, and bring its run directory back.

Only the cluster's job server (the dashboard, port 8265) is talked to. The code of the three packages, the config and
the prompts file that it or ``--set`` names are uploaded, so the cluster needs the dependencies but not this project.
The run directory lies on the cluster's head node; it comes back through the log of a second, tiny job.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import importlib.util
import io
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from speckv_online.console import run_command, say
from speckv_online.errors import UserError
from speckv_online.io.files import read_settings
from speckv_online.io.manifest import git_state

PACKAGES = ("experiments", "speckv_online", "policies")
#: A packed run directory that is larger stays where it is.
MOST_BYTES = 64_000_000
_BEGIN, _END = "-----BEGIN SPECKV RUN-----", "-----END SPECKV RUN-----"
#: For how long a cluster that has just been started may be without its job agent.
AGENT_SECONDS = 90.0
#: What Ray's job server says until then.
NO_AGENT = "No available agent"
#: Where runs go on the cluster's head node, unless the config or a flag says otherwise.
REMOTE = "~/speckv-runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``speckv submit``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML settings of experiments.compare")
    parser.add_argument("--address", metavar="URL", help="job server, e.g. http://HEAD:8265 (default: RAY_ADDRESS)")
    parser.add_argument("--name", default="", help="name of the run (default: CONFIG__TIME); one that exists goes on")
    parser.add_argument("--out", metavar="DIR", help="where the run directory goes here (default: runs/NAME)")
    parser.add_argument("--remote-out", metavar="DIR", help=f"where it goes on the cluster (default: {REMOTE}/NAME)")
    parser.add_argument("--add", action="append", default=[], metavar="PATH",
                        help="upload a file or folder as well, e.g. your policy.py; may be repeated")  # fmt: skip
    parser.add_argument("--python", default="python", help="Python on the cluster (default: %(default)s)")
    parser.add_argument("--no-fetch", action="store_true", help="leave the run directory on the cluster")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as for experiments.compare")


def run(arguments: argparse.Namespace) -> int:
    """Run ``speckv submit``; return the exit code of the job."""
    config = Path(arguments.config)
    settings, sets = _settings(config, arguments.set)
    name = arguments.name or f"{config.stem}__{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UserError(f"--name {name!r}: use letters, digits, dots, hyphens and underscores")
    remote = str(arguments.remote_out or settings.get("out") or f"{REMOTE}/{name}")
    if not remote.startswith(("/", "~/")):
        raise UserError(f"{remote} is not absolute: a job runs in a copy of the code that is deleted later")
    client = _connect(arguments.address)
    with tempfile.TemporaryDirectory(prefix="speckv-submit-") as folder:
        _stage(Path(folder), settings, arguments.add)
        commit = git_state().get("commit")
        runtime = {"working_dir": folder, "env_vars": {"SPECKV_GIT_COMMIT": commit} if commit else {}}
        words = [arguments.python, "-m", "experiments.compare", "--config", "config.yaml"]
        command = shlex.join([*words, *(f"--set={text}" for text in sets)]) + f" --out {_quoted(remote)}"
        say(f"submitting {name}: {command}")
        try:
            job = _submit(client, command, runtime, {"name": name})
        except RuntimeError as e:
            advice = "try again"
            if NO_AGENT in str(e):  # it never comes up where another program has its port
                advice = "if another Ray runs there, start this one with --dashboard-agent-listen-port of its own"
            raise UserError(f"the cluster did not take the job ({_short(e)}): {advice}") from e
        code = _follow(client, job)
        if arguments.no_fetch:
            say(f"the run directory is {remote} on the cluster's head node")
            return code
        packer = f"{shlex.quote(arguments.python)} -m speckv_online.cli.submit {_quoted(remote)}"
        _fetch(client, packer, runtime, remote, Path(arguments.out or f"runs/{name}").expanduser())
    return code


def pack(folder: str | Path) -> str:
    """Return a folder as base64 text of a compressed tar archive, between two marker lines."""
    import tarfile

    folder, buffer = Path(folder).expanduser(), io.BytesIO()
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: the job ended before it wrote anything")
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                archive.add(file, str(file.relative_to(folder)))
    if len(buffer.getvalue()) > MOST_BYTES:
        raise UserError(f"{folder} has {len(buffer.getvalue()) // 1_000_000} MB packed: fetch it by other means")
    return f"{_BEGIN}\n{base64.encodebytes(buffer.getvalue()).decode()}{_END}"


def unpack(text: str, folder: str | Path) -> int:
    """Write what :func:`pack` returned into a folder, and return the number of files.

    Raises
    ------
    UserError
        If the text holds no complete archive, or the archive holds anything but plain files inside of the folder.
    """
    import tarfile

    begin, end = text.find(_BEGIN), text.rfind(_END)
    if begin < 0 or end < begin:
        raise UserError("the run directory did not come through")
    try:
        data = base64.b64decode(text[begin + len(_BEGIN) : end])
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            members = archive.getmembers()
            if not all(member.isfile() for member in members):
                raise UserError("the archive of the run directory holds more than plain files")
            Path(folder).mkdir(parents=True, exist_ok=True)
            archive.extractall(folder, filter="data")
    except (binascii.Error, tarfile.TarError, EOFError, ValueError) as e:
        raise UserError(f"the run directory came through broken ({type(e).__name__})") from e
    return len(members)


def _connect(address: str | None) -> Any:
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    if address is not None and not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: give the job server's address, e.g. http://HEAD:8265")
    where = f"at {address}" if address else "here"
    try:
        return JobSubmissionClient(address)
    except RayError as e:  # its AuthenticationError, which older versions do not have
        raise UserError(
            f"the Ray {where} does not let this command in ({_short(e)}): if it wants a token, "
            "`export RAY_AUTH_MODE=token` and have the token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from e
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise UserError(
            f"no Ray job server answers {where} ({_short(e)}): "
            "start one with `ray start --head`, or give --address http://HEAD:8265"
        ) from e


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


def _settings(config: Path, sets: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the config with what of ``--set`` is used here, prompts (maybe a file to upload) and out, and the rest."""
    settings, others = read_settings(config), []
    for text in sets:
        name, _, value = (part.strip() for part in text.partition("="))
        if name in ("prompts", "out"):
            settings[name] = value
        else:
            others.append(text)
    return settings, others


def _stage(folder: Path, settings: dict[str, Any], more: Sequence[str]) -> None:
    """Put together what is uploaded: the packages, the settings, their prompts file, and what the user adds."""
    from speckv_online.io.prompts import PACKAGED

    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise UserError(f"the {package} package is not installed here: install speckv_online from its repository")
        source = found.submodule_search_locations[0]
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    prompts = str(settings.get("prompts", ""))
    if prompts and not prompts.isdecimal() and prompts.lower() not in PACKAGED:
        # As experiments.compare would read it: from where the user is.
        _copy(Path(prompts).expanduser(), folder / "prompts.jsonl")
        settings = settings | {"prompts": "prompts.jsonl"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    for path in (Path(name).expanduser() for name in more):
        if path.name in {*PACKAGES, "config.yaml", "prompts.jsonl"}:
            raise UserError(f"--add {path}: the name {path.name} is taken")
        _copy(path, folder / path.name)


def _copy(source: Path, destination: Path) -> None:
    try:
        if source.is_dir():
            shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__", ".git", ".venv"))
        else:
            shutil.copyfile(source, destination)
    except OSError as e:
        raise UserError(f"cannot read {source}: {e.strerror or e}") from e


def _submit(client: Any, command: str, runtime: dict[str, Any], metadata: dict[str, str] | None = None) -> str:
    """Submit a job; return its id.

    The job server answers before the agent that starts jobs is up, and refuses jobs until then: it is waited for.
    """
    end, told = time.monotonic() + AGENT_SECONDS, False
    while True:
        try:
            return str(client.submit_job(entrypoint=command, runtime_env=runtime, metadata=metadata))
        except RuntimeError as e:
            if NO_AGENT not in str(e) or time.monotonic() > end:
                raise
        if not told:
            say("the cluster takes no jobs yet: waiting for its job agent")
        told = True
        time.sleep(1.0)


def _follow(client: Any, job: str) -> int:
    """Print a job's log as it comes; return the exit code of its command, or 1 if it was never started or stopped."""

    import asyncio

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    try:
        asyncio.run(tail())
        info = _wait(client, job)
    except KeyboardInterrupt:
        say(f"the job goes on; its log: ray job logs {job}; to stop it: ray job stop {job}")
        raise
    status = str(getattr(info.status, "value", info.status))
    if status != "SUCCEEDED":
        reason = str(info.message).partition(", last available logs")[0]  # the log was shown already
        say(f"the job {job} ended with status {status}: {' '.join(reason.split())[:300]}")
    return 0 if status == "SUCCEEDED" else int(info.driver_exit_code or 1)


def _wait(client: Any, job: str) -> Any:
    """Return the facts of a job once it has ended."""
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.5)
    return info


def _fetch(client: Any, command: str, runtime: dict[str, Any], remote: str, out: Path) -> None:
    """Bring the run directory here, or say where it lies."""
    log, failed = "", False
    try:
        job = _submit(client, command, runtime)
        failed = bool(_wait(client, job).driver_exit_code)
        log = client.get_job_logs(job)
        count = unpack(log, out)
    except (UserError, RuntimeError) as error:  # the latter where the cluster does not answer any more
        reason = log.strip().splitlines()[-1] if failed and log.strip() else " ".join(str(error).split())[:200]
        say(f"{reason}; if anything was written, it lies in {remote} on the cluster's head node")
        return
    say(f"{count} files came back: {out}; on the cluster's head node they lie in {remote}")


def _quoted(path: str) -> str:
    """Quote a path for the shell, which is to expand a leading tilde."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


if __name__ == "__main__":
    sys.exit(run_command("submit", lambda: print(pack(sys.argv[1]))))
