"""``speckv submit``: what it refuses, what it uploads, and how a run directory travels. Real jobs: test_ray.py."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
import yaml

from speckv_online.cli import submit
from speckv_online.cli.app import main
from speckv_online.errors import UserError
from tests.support.runs import free_port


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("levels: [nf4]\nprompts: 2\n")
    return path


def test_a_run_directory_travels_as_text(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "plots").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "plots" / "a.png").write_bytes(os.urandom(100_000))
    (run / ".lock").touch()
    log = f"some line\n{submit.pack(run)}\nanother line\n"
    assert submit.unpack(log, tmp_path / "back") == 2
    assert (tmp_path / "back" / "plots" / "a.png").read_bytes() == (run / "plots" / "a.png").read_bytes()
    assert sorted(f.name for f in (tmp_path / "back").iterdir()) == ["plots", "run.json"]
    for broken, message in (
        ("nothing", "did not come through"),
        (log.replace("-----END", "END"), "did not come through"),
        (log.replace(log.splitlines()[5], ""), "came through broken"),
    ):
        with pytest.raises(UserError, match=message):
            submit.unpack(broken, tmp_path / "other")
    with pytest.raises(UserError, match="is not there"):
        submit.pack(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["outside", "link"])
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("../escaped" if kind == "outside" else "link")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    text = f"{submit._BEGIN}\n{base64.encodebytes(buffer.getvalue()).decode()}{submit._END}"
    with pytest.raises(UserError):
        submit.unpack(text, tmp_path / "back")
    assert not (tmp_path / "escaped").exists()
    assert not list((tmp_path / "back").glob("*"))


@pytest.mark.parametrize(
    ("sets", "prompts", "uploaded"),
    [
        ([], 2, None),
        (["prompts=9", "prompts = mine.txt"], "prompts.jsonl", "mine"),
        (["prompts=12"], "12", None),
        (["prompts=HumanEval"], "HumanEval", None),
    ],
    ids=["config", "file", "count", "packaged"],
)
def test_prompts_given_with_set_travel_too(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sets: list[str],
    prompts: object,
    uploaded: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "PACKAGES", ())  # 28 MB, looked at below
    Path("mine.txt").write_text("mine")
    settings, others = submit._settings(config, ["seed=3", *sets])
    assert others == ["seed=3"]
    folder = tmp_path / "staged"
    folder.mkdir()
    submit._stage(folder, settings, [])
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"levels": ["nf4"], "prompts": prompts}
    copy = folder / "prompts.jsonl"
    assert (copy.read_text() if copy.exists() else None) == uploaded
    with pytest.raises(UserError, match="cannot read absent"):
        submit._stage(folder, {"prompts": "absent"}, [])


def test_an_out_given_with_set_is_where_the_run_goes(config: Path) -> None:
    settings, others = submit._settings(config, ["out = /data/run1", "seed=3"])
    assert (settings["out"], others) == ("/data/run1", ["seed=3"])


def test_what_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text('{"task": "chat", "prompt": "hello"}\n')
    Path("twice.py").write_text("x = 1\n")
    folder = tmp_path / "staged"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    submit._stage(folder, {"levels": ["nf4"], "prompts": "~/mine.jsonl"}, ["~/twice.py"])
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml", "experiments", "policies", "prompts.jsonl", "speckv_online", "twice.py",
    ]  # fmt: skip
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"levels": ["nf4"], "prompts": "prompts.jsonl"}
    assert (folder / "experiments" / "compare" / "__main__.py").exists()
    assert list((folder / "speckv_online" / "data").iterdir())
    assert not list(folder.rglob("__pycache__"))
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 100_000_000  # what a job server takes


def test_mistakes_are_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "broken.yaml").write_text("a: [")
    server = f"http://127.0.0.1:{free_port()}"
    for arguments, message in (
        ([str(config), "--address", server], f"no Ray job server answers at {server}"),
        ([str(config), "--address", "127.0.0.1:6379"], "give the job server's address"),
        ([str(tmp_path / "absent.yaml")], "cannot read the config"),
        ([str(tmp_path / "broken.yaml")], "is not valid YAML"),
        ([str(config), "--name", "a b"], "use letters"),
        ([str(config), "--remote-out", "runs/x"], "is not absolute"),
    ):
        assert main(["submit", *arguments]) == 2
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert line.startswith("speckv: error: ")
        assert message in line


def test_a_cluster_that_wants_a_token(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert main(["submit", str(config), "--address", f"http://127.0.0.1:{server.server_port}"]) == 2
        finally:
            server.shutdown()
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not let this command in (Authentication required" in line
    assert "export RAY_AUTH_MODE=token" in line


def test_a_cluster_without_its_job_agent_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    """As Ray's job server answers until the agent is up: refused with this reason, then taken."""
    refusals = ["No available agent to submit job, please try again later."] * 2

    class Starts(BaseHTTPRequestHandler):
        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self._answer(200, json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": ""}))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if refusals:
                self._answer(500, refusals.pop())
            else:
                self._answer(200, json.dumps({"job_id": "a", "submission_id": "a"}))

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Starts) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            client = submit._connect(f"http://127.0.0.1:{server.server_port}")
            assert submit._submit(client, "true", {}) == "a"
            assert capsys.readouterr().err.count("waiting for its job agent") == 1
            refusals.append("Something else.")
            with pytest.raises(RuntimeError, match="Something else"):
                submit._submit(client, "true", {})
        finally:
            server.shutdown()
