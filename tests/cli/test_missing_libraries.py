"""Ray, river, bitsandbytes and matplotlib are loaded by what needs them alone, and named in one line if missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from speckv_online.console import LIBRARIES
from tests.support.random_traces import random_traces, save
from tests.support.runs import write_prompts
from tests.support.tiny_models import TinyPair

#: Runs commands, one after the other, in a Python that lacks some libraries; prints what each gave as JSON.
SCRIPT = """
import contextlib, io, json, runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
found = []
for module, *flags in {commands!r}:
    sys.argv, out, error, code = [module, *flags], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    found.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(found))
"""


def run_without(missing: list[str], commands: Sequence[Sequence[object]]) -> list[tuple[int, str, str]]:
    """Run ``speckv ...`` or ``experiments.x ...`` commands in a Python that cannot import some libraries.

    Returns the exit code, output and error output of each.
    """
    texts = [[str(word) for word in command] for command in commands]
    texts = [["speckv_online.cli" if module == "speckv" else module, *flags] for module, *flags in texts]
    code = SCRIPT.format(missing=missing, commands=texts)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, traces, a config and a card for the commands to read."""
    folder = tmp_path_factory.mktemp("without")
    write_prompts(folder / "prompts.jsonl")
    save(random_traces(3, ("fp16",)), folder / "traces")
    (folder / "config.yaml").write_text("prompts: '2'\n")
    (folder / "card.json").write_text('{"training": {"log": [[1, 2.0, 0.5]]}}')
    return folder


@pytest.fixture(scope="module")
def done(folder: Path, tiny_pair: TinyPair) -> dict[str, list[tuple[int, str, str]]]:
    """Every command without any of the libraries, in one process: those that work, and by library those that do not."""
    models = ["--target", tiny_pair.target_dir, "--draft", tiny_pair.draft_dir, "--device", "cpu"]
    compare = ["experiments.compare", *models, "--prompts", folder / "prompts.jsonl"]
    generate = ["speckv", "generate", *models, "--prompt", "hi"]
    more = ["--policies", "autoregressive,fixed:2", "--max-new-tokens", 8]
    commands: dict[str, list[list[object]]] = {
        "": [
            [*compare, "--levels", "fp16", "--local", *more, "--out", folder / "run"],
            ["speckv", "policies"],
            ["speckv", "simulate", folder / "traces", "--policies", "fixed:2,online", "--cost", "rtx3090-release"],
            [*generate, "--max-new-tokens", 6],
            ["speckv", "report", folder / "run"],
            ["speckv", "report", folder / "run", "--json"],
            ["speckv", "watch", folder / "run", "--once"],
        ],
        "ray": [
            [*compare, "--out", folder / "out"],
            ["speckv", "submit", folder / "config.yaml", "--address", "http://127.0.0.1:1"],
        ],
        "river": [[*generate, "--policy", "river"], [*generate, "--policy", "online:adwin=0.01"]],
        "bitsandbytes": [
            [*generate, "--compression", "nf4"],
            [*generate, "--compression", "int8"],
            [*generate, "--compression", "bitsandbytes_4bit:bnb_4bit_quant_type=fp4"],
            [*compare, "--levels", "nf4", "--local", "--out", folder / "nf4"],
        ],
        "matplotlib": [["experiments.distill.plot", folder / "card.json", folder / "curve.png"]],
    }
    found = iter(run_without(list(LIBRARIES), [command for part in commands.values() for command in part]))
    return {library: [next(found) for _ in part] for library, part in commands.items()}


def test_what_needs_none_of_them_works(done: dict[str, list[tuple[int, str, str]]], folder: Path) -> None:
    shown = ("autoregressive", "online", "online", "tokens/s (measured)", "autoregressive", '"advice"', "fixed:2")
    for (code, out, error), text in zip(done[""], shown, strict=True):
        assert code == 0, error
        assert text in out
    assert "no plots, as matplotlib is not installed" in done[""][0][2]
    assert (folder / "run" / "report.html").exists()
    assert not (folder / "run" / "plots").exists()


@pytest.mark.parametrize("library", ["ray", "river", "bitsandbytes", "matplotlib"])
def test_what_needs_one_says_so_in_one_line(library: str, done: dict[str, list[tuple[int, str, str]]]) -> None:
    assert done[library]
    for code, _, error in done[library]:
        assert code == 2, error
        assert "Traceback" not in error
        last = error.rstrip("\n").splitlines()[-1]
        assert "error: " in last
        assert library in last
        assert "pip install " in last
