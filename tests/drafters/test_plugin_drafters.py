"""Drafters of other packages: an installed one is found by its name, and drafts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from policies.fixed import Fixed
from speckv_online.cli.app import main
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.fingerprint import drafter_fingerprint
from speckv_online.drafters.spec import parse_drafter
from speckv_online.errors import UserError
from speckv_online.models.pairs import load_pair
from tests.support.decoding import plain, prompt_of
from tests.support.tiny_models import TinyPair

PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "speckv-echo"
version = "0.1.0"

[project.entry-points."speckv_online.drafters"]
echo = "speckv_echo:Echo"
careful = "speckv_echo:Careful"
broken = "speckv_echo.absent:Gone"
function = "speckv_echo:make"

[tool.setuptools]
packages = ["speckv_echo"]
"""
CODE = '''
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter


class Echo(NgramDrafter):
    """Proposes the latest token again."""

    needs_model = False
    names = ("echo",)

    def __init__(self, *, times: int = 2) -> None:
        if times < 1:
            raise ValueError("times must be at least 1")
        self.times, self.fingerprint = times, f"echo-{times}"

    def begin(self, tokens, capacity, sampler=None):
        super().begin(tokens, capacity, sampler)
        self.latest, self.left = tokens[-1], self.times

    def draft(self, signals):
        if not self.left:
            return -1
        self.left -= 1
        self.proposals.append(None)
        signals[:] = (1.0, 0.5, 0.0, 0.0)
        return self.latest

    def sure(self):
        return 0.5 if self.left else 0.0

    def end(self, accepted):
        self.proposals, self.left = [], self.times

    def extend(self, tokens):
        self.latest = tokens[-1]


class Careful(ModelDrafter):
    """The draft model, under another name."""

    names = ("careful",)


def make(model):
    return model
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "speckv_echo").mkdir()
    (source / "speckv_echo" / "__init__.py").write_text(CODE)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=120)
    return target


@pytest.fixture
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(package)
    importlib.invalidate_caches()
    return package


def test_a_plugin_without_a_model_drafts(installed: Path, tiny_pair: TinyPair) -> None:
    pair = load_pair(target=str(tiny_pair.target_dir), drafter="echo:times=3", level="fp32", device="cpu")
    assert pair.drafter.names == ("echo",)
    decoder = SpeculativeDecoder(pair.drafter, policy=Fixed(gamma=8), target=pair.target, level="fp32")
    prompt = prompt_of(12)
    found = decoder.generate(prompt, 24)
    assert found.tokens == plain(pair.target, prompt, 24)
    assert max(step.drafted for step in found.steps) == 3
    both = [parse_drafter(f"echo:times={n}").build(None, 260) for n in (2, 3)]
    assert [drafter_fingerprint(drafter) for drafter in both] == ["echo-2", "echo-3"]


def test_a_plugin_with_a_model_drafts(installed: Path, tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--target", str(tiny_pair.target_dir), "--draft", str(tiny_pair.draft_dir), "--device", "cpu"]
    flags = ["generate", *models, "--prompt", "hello", "--max-new-tokens", "12", "--policy", "fixed:2", "--json"]
    texts = []
    for drafter in ("model", "careful"):
        assert main([*flags, "--drafter", drafter]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1]
    built = parse_drafter("careful").build(tiny_pair.draft, 260)
    # A class of its own may propose anything, so traces of the two must not mix.
    assert drafter_fingerprint(built) != drafter_fingerprint(parse_drafter("model").build(tiny_pair.draft, 260))


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "broken": (lambda: parse_drafter("broken"), "the drafter broken of the package speckv-echo: cannot import drafter "
               "speckv_echo.absent:Gone: no module named 'speckv_echo.absent'"),
    "unknown": (lambda: parse_drafter("ecko"), "unknown drafter 'ecko': choose model, ngram, hybrid, broken, careful, "
                "echo, function"),
    "function": (lambda: parse_drafter("function"), "the drafter function is no class: speckv_echo:make"),
    "option": (lambda: parse_drafter("echo:time=3"), "unknown option 'time': did you mean times?"),
    "value": (lambda: parse_drafter("echo:times=three"), "echo: times must be a whole number, got 'three'"),
    "options that there are not": (lambda: parse_drafter("careful:x=1"), "unknown option 'x': it has none"),
    "constructor": (lambda: parse_drafter("echo:times=0").build(None, 260), "the drafter echo cannot be built: "
                    "ValueError: times must be at least 1"),
    "models": (lambda: parse_drafter("echo").check_models("a", "b"), "--drafter echo uses no draft model"),
    "no model": (lambda: parse_drafter("careful").check_models("a", None), "--target and --draft go together"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, installed: Path) -> None:
    call, said = MISTAKES[name]
    with pytest.raises(UserError) as found:
        call()
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_a_plugin_that_does_not_load_ends_a_command_with_one_line(
    installed: Path, tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target", str(tiny_pair.target_dir), "--prompt", "hello", "--drafter", "broken"]
    assert main(["generate", *flags]) == 2
    assert capsys.readouterr().err.startswith("speckv: error: the drafter broken of the package speckv-echo: ")
