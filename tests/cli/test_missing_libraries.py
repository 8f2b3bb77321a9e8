"""Ray, river, bitsandbytes and matplotlib are loaded by what needs them alone, and named in one line if missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speckv_online.console import LIBRARIES
from tests.support.random_traces import random_traces, save
from tests.support.runs import write_prompts
from tests.support.tiny_models import TinyPair

#: Runs a command in a Python that lacks some libraries.
SCRIPT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
import runpy
sys.argv = {argv!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def run_without(missing: list[str], command: list[object]) -> subprocess.CompletedProcess[str]:
    """Run ``speckv ...`` or ``experiments.x ...`` in a Python that cannot import some libraries."""
    module, *flags = map(str, command)
    module = "speckv_online.cli" if module == "speckv" else module
    code = SCRIPT.format(missing=missing, argv=[module, *flags], module=module)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def models(tiny_pair: TinyPair) -> list[object]:
    return ["--target", tiny_pair.target_dir, "--draft", tiny_pair.draft_dir, "--device", "cpu"]


@pytest.fixture(scope="module")
def run(models: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run, made without any of the libraries."""
    folder = tmp_path_factory.mktemp("run")
    prompts = write_prompts(folder / "prompts.jsonl")
    command = ["experiments.compare", *models, "--prompts", prompts, "--levels", "fp16", "--local"]
    more = ["--policies", "autoregressive,fixed:2", "--max-new-tokens", 8, "--out", folder / "out"]
    done = run_without(list(LIBRARIES), [*command, *more])
    assert done.returncode == 0, done.stderr
    assert "no plots, as matplotlib is not installed" in done.stderr
    return folder / "out"


def test_what_needs_none_of_them_works(models: list[object], run: Path, tmp_path: Path) -> None:
    save(random_traces(3, ("fp16",)), tmp_path)
    for command, shown in (
        (["speckv", "policies"], "online"),
        (["speckv", "simulate", tmp_path, "--policies", "fixed:2,online", "--cost", "rtx3090-release"], "online"),
        (["speckv", "generate", *models, "--prompt", "hi", "--max-new-tokens", 6], "tokens/s (measured)"),
        (["speckv", "report", run], "autoregressive"),
        (["speckv", "report", run, "--json"], '"advice"'),
        (["speckv", "watch", run, "--once"], "fixed:2"),
    ):
        done = run_without(list(LIBRARIES), command)
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
    assert (run / "report.html").exists()
    assert not (run / "plots").exists()


@pytest.mark.parametrize("library", ["ray", "river", "bitsandbytes", "matplotlib"])
def test_what_needs_one_says_so_in_one_line(library: str, models: list[object], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    save(random_traces(2, ("fp16",)), tmp_path / "traces")
    generate = ["speckv", "generate", *models, "--prompt", "hi"]
    compare = ["experiments.compare", *models, "--prompts", prompts, "--out", tmp_path / "out"]
    config = tmp_path / "config.yaml"
    config.write_text("prompts: '2'\n")
    card = tmp_path / "card.json"
    card.write_text('{"training": {"log": [[1, 2.0, 0.5]]}}')
    commands: dict[str, list[list[object]]] = {
        "ray": [compare, ["speckv", "submit", config, "--address", "http://127.0.0.1:1"]],
        "river": [[*generate, "--policy", "river"], [*generate, "--policy", "online:adwin=0.01"]],
        "bitsandbytes": [
            [*generate, "--compression", "nf4"],
            [*generate, "--compression", "int8"],
            [*generate, "--compression", "bitsandbytes_4bit:bnb_4bit_quant_type=fp4"],
            [*compare, "--levels", "nf4", "--local"],
        ],
        "matplotlib": [["experiments.distill.plot", card, tmp_path / "curve.png"]],
    }  # fmt: skip
    for command in commands[library]:
        done = run_without([library], command)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.rstrip("\n").splitlines()[-1]
        assert "error: " in last
        assert library in last
        assert "pip install " in last
