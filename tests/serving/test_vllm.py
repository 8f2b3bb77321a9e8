"""The plug-in inside a real vLLM, on tiny models."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.load.server import SCHEDULER, Server, environment
from speckv_online.errors import UserError
from speckv_online.io.run_directory import load_arrays
from tests.support.serving import make_models

HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: see the extra [vllm]"),
    pytest.mark.timeout(300),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    make_models(path)
    return path


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.support.serving", str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    )
    assert not done.returncode, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[int]]:
    found: list[list[int]] = run(folder, "none", "", "exact")["outputs"]
    assert len(found) == 64
    assert len({tuple(output) for output in found}) > 32
    return found


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_outputs_are_those_without_drafts(method: str, folder: Path, plain: list[list[int]]) -> None:
    found = run(folder, method, "tests.support.serving:Wild", "exact")
    assert found["outputs"] == plain
    counts = found["counts"]
    assert counts["fallbacks"] == {}
    assert counts["accepted_tokens"]["0"] > 50
    assert counts["trimmed_tokens"] > 50
    assert len(counts["steps"]) > 5
    assert found["left"] <= 0


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_requests_are_cancelled(method: str, folder: Path, plain: list[list[int]]) -> None:
    found = run(folder, method, "online", "cancel")
    ended = found["requests"]
    assert ended["finished"] + ended["cancelled"] == 1000
    assert min(ended.values()) > 100
    assert found["outputs"] == plain
    assert found["counts"]["fallbacks"] == {}
    assert found["left"] <= 0


def test_a_pause_costs_no_acceptance(folder: Path, plain: list[list[int]]) -> None:
    lazy, always = (
        run(folder, "draft_model", "tests.support.serving:Pauses", "exact", how) for how in ("lazy", "eager")
    )
    assert lazy["outputs"] == always["outputs"] == plain
    assert lazy["counts"]["accepted_tokens"] == always["counts"]["accepted_tokens"]
    assert sum(lazy["counts"]["accepted_tokens"].values()) > 200


@pytest.mark.parametrize("policy", ["autoregressive", "fixed:2"])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_what_vllm_does_for_no_drafts_is_left_out(
    method: str, policy: str, folder: Path, plain: list[list[int]]
) -> None:
    found = run(folder, method, policy, "exact")
    assert found["outputs"] == plain
    assert found["asked"]["drafts"] == 0  # they come with the tokens
    assert bool(found["asked"]["verified"]) == (policy == "fixed:2") == bool(found["counts"]["drafted_tokens"])


def test_a_policy_that_raises_costs_speed_only(folder: Path, plain: list[list[int]]) -> None:
    found = run(folder, "ngram", "tests.support.serving:Raises", "exact")
    assert found["outputs"] == plain
    assert found["counts"]["fallbacks"]["decide raised"] > 100
    assert any(key.endswith("/8") for key in found["counts"]["steps"])


def test_a_request_turns_drafts_off(folder: Path, plain: list[list[int]]) -> None:
    all_on, half = (run(folder, "draft_model", "fixed:2", task) for task in ("exact", "off"))
    assert half["outputs"] == all_on["outputs"] == plain
    drafted, fewer = (found["counts"]["drafted_tokens"]["0"] for found in (all_on, half))
    assert 0.3 * drafted < fewer < 0.6 * drafted


def test_a_kill_leaves_a_state_that_the_next_start_uses(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    about = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    given = [
        "--model", f"{folder}/target", "--served-model-name", "target", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "256", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.1", "--no-async-scheduling",
        "--scheduler-cls", SCHEDULER, "--speculative-config", json.dumps(about),
        "--additional-config", json.dumps({"speckv": {"state": str(state)}}),
    ]  # fmt: skip
    around = environment(1) | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

    def ask(server: Server, answers: list[int], user: int) -> None:
        """Decode until the server is gone, and count the answers."""
        body = {"model": "target", "prompt": [5, 6, 7] * 8, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        head = {"Content-Type": "application/json"}
        while True:
            try:
                asked = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), head)
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    answers[user] += len(json.load(answer)["choices"])
            except (OSError, http.client.HTTPException):
                return

    for run in ("first", "second"):
        server = Server(sys.executable, given, around, tmp_path / f"{run}.log")
        try:
            server.wait()
            assert ("resumed" in server.log.read_text()) == (run == "second")
            written = state.stat().st_mtime_ns if state.exists() else 0
            answers = [0, 0, 0]
            with ThreadPoolExecutor(3) as pool:
                users = [pool.submit(ask, server, answers, user) for user in range(3)]
                end = time.monotonic() + 120
                while time.monotonic() < end:  # until all had an answer, and the state was written
                    if min(answers) and (state.stat().st_mtime_ns if state.exists() else 0) != written:
                        break
                    time.sleep(0.05)
                os.killpg(server.process.pid, signal.SIGKILL)  # the engine's process, too
                for user in users:
                    user.result()
            assert min(answers) > 0
        finally:
            server.stop()
        assert load_arrays(state)["history.head.misc"][1] > 20
    assert [path.name for path in tmp_path.glob("*.npz*")] == ["state.npz"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"additional_config": {"speckv": {"policy": "onlin"}}}, "did you mean online"),
        ({"additional_config": {"speckv": {"polcy": "online"}}}, "settings are policy, state, metrics"),
        ({"speculative_config": None}, "give --speculative-config"),
    ],
)
def test_mistakes_are_told_in_a_line(options: dict[str, Any], line: str, folder: Path) -> None:
    settings: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.1, "async_scheduling": False,
        "speculative_config": {"method": "draft_model", "model": f"{folder}/draft", "num_speculative_tokens": 2},
        "scheduler_cls": "speckv_online.serving.vllm.PolicyScheduler",
    }  # fmt: skip
    program = f"from vllm import LLM\nLLM({str(folder / 'target')!r}, **{settings | options!r})"
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=os.environ | more | path
    )
    assert done.returncode
    assert line in done.stderr.strip().splitlines()[-1]


def test_async_scheduling_is_refused() -> None:
    from speckv_online.serving.vllm import check

    config = SimpleNamespace(speculative_config=object(), scheduler_config=SimpleNamespace(async_scheduling=True))
    with pytest.raises(UserError, match="give --no-async-scheduling"):
        check(config)
