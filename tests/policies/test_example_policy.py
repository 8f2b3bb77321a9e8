"""The example package installs by itself, and its policy is found by name and runs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from policies.registry import available, make_policy, options
from tests.support.tapes import make_tapes, play

PACKAGE = Path(__file__).parents[2] / "docs" / "example_policy"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source, target = tmp_path / "source", tmp_path / "target"
    for file in sorted(PACKAGE.rglob("*")):
        if file.suffix in (".py", ".toml", ".md"):
            copy = source / file.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=120)
    monkeypatch.syspath_prepend(target)
    importlib.invalidate_caches()
    return target


def test_the_example_installs_and_runs_by_name(installed: Path) -> None:
    assert "patient" in dict(available())
    assert options("patient")["wanted"] == ("a number", 0.7)
    tapes = make_tapes(3, 6)
    strict, easy = make_policy("patient:0.9"), make_policy("patient:wanted=0.3")
    assert str(installed) in sys.modules[type(strict).__module__].__file__  # type: ignore[operator]
    cautious, bold = play(strict, tapes, "nf4"), play(easy, tapes, "nf4")
    assert strict.info()["threshold"] > easy.info()["threshold"]
    assert np.mean(cautious.gammas) < np.mean(bold.gammas)
    again = make_policy("patient:0.9")
    again.load_state_dict(strict.state_dict())
    assert again.info() == strict.info()
