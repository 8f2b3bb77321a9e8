"""The benchmark against llama.cpp: files, processes, turns, and what they say. Most of it needs no llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench.llamacpp import turns
from experiments.bench.llamacpp.__main__ import main
from experiments.bench.llamacpp.files import FORMATS, SHAPES, Shape, made, rewrite, write_draft, write_random
from experiments.bench.llamacpp.ours import Ours
from experiments.bench.llamacpp.peer import Lookup
from experiments.bench.llamacpp.summary import show, summarise
from experiments.bench.llamacpp.turns import Kept, OutOfTime
from experiments.bench.llamacpp.worker import Worker
from speckv_online.errors import UserError
from speckv_online.models.distilled_draft import load_shipped_draft
from speckv_online.models.gguf_file import GgufFile
from speckv_online.models.pairs import DEFAULT_PAIR, load_target, prepare

TINY = Shape(64, 2, 4, 2, 128, 96, context=128)
LEVELS = {"f16": "fp16", "q8_0": "q8_0", "q4_1": "q4_1"}
PROMPT = [5, 17, 80, 3, 41]
needs_peer = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {
        kind: made(folder / f"{kind}.gguf", lambda out, kind=kind: write_random(out, kind, TINY)) for kind in FORMATS
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_random_models_of_every_format_are_read(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    target = load_target(files[kind], None, "cpu", "off")
    assert target.config.quantization_config["quant_method"] == LEVELS[kind]
    rewrite(files["f16"], tmp_path / "again.gguf", kind)  # F16 first: a matrix goes through two types
    again = load_target(tmp_path / "again.gguf", None, "cpu", "off")
    for (name, ours), theirs in zip(target.state_dict().items(), again.state_dict().values(), strict=True):
        assert (ours - theirs).abs().max() < {"f16": 1e-9, "q8_0": 1e-3, "q4_1": 1e-2}[kind], name
    size = sum(t.data.nbytes for t in GgufFile(files[kind]).tensors.values())
    assert size < files[kind].stat().st_size < size + 5000


def test_a_file_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        made(tmp_path / "a.gguf", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_perfect_draft_is_accepted_and_says_the_same(files: dict[str, Path]) -> None:
    ours = Ours(str(files["q8_0"]), None, False, 1)
    plain = ours.generate(PROMPT, 21, "plain")
    perfect = ours.generate(PROMPT, 21, "perfect:4", plain["tokens"])
    assert perfect["tokens"] == plain["tokens"]
    assert (plain["decoded"], plain["steps"], plain["drafted"]) == (20, 21, 0)
    assert (perfect["steps"], perfect["drafted"]) == (5, 16)  # 5 + 5 + 5 + 5 + 1
    for width in (1, 3):
        seconds = ours.forwards(PROMPT, width, 6)
        assert len(seconds) == 6
        assert min(seconds) > 0


def test_an_engine_in_a_process_of_its_own(files: dict[str, Path]) -> None:
    worker = Worker("ours", file=str(files["f16"]), level=None, draft=False, threads=1)
    try:
        found = worker.ask("generate", prompt=PROMPT, tokens=8, mode="plain")
        assert found["tokens"] == Ours(str(files["f16"]), None, False, 1).generate(PROMPT, 8, "plain")["tokens"]
        memory = worker.memory()
        assert 50e6 < memory["own"] < memory["resident"] <= memory["peak"] < 2e9
        with pytest.raises(UserError, match="prompt is empty"):
            worker.ask("generate", prompt=[], tokens=8, mode="plain")
    finally:
        worker.close()
    with pytest.raises(UserError, match="there is no"):
        Worker("ours", file=str(files["f16"].parent / "none"), level=None, draft=False, threads=1)


def test_a_lookup_proposes_what_followed() -> None:
    lookup = Lookup()
    assert lookup.propose([1, 2, 3, 4, 1], 4) == []
    assert lookup.propose([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9, 7, 1, 2], 2) == [9, 7]  # the latest
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9, 7, 1, 2, 3, 4], 1) == [1]  # the longest


def test_turns_are_kept_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    kept = Kept(path, 0.0)
    assert kept.need("a")
    kept.put("a", [1])
    with path.open("a") as file:
        file.write('{"key": "b", "fou')  # killed while it wrote
    again = Kept(path, 1e-9)
    assert again.found == {"a": [1]}
    assert not again.need("a")
    with pytest.raises(OutOfTime):
        again.need("b")
    path.write_text('{"another": "file"}\n')
    with pytest.raises(UserError, match="holds no turns"):
        Kept(path, 0.0)


def call(name: str, mode: str, tokens: list[int], seconds: float, prompt_seconds: float = 1.0) -> dict[str, Any]:
    return {
        "name": name, "mode": mode, "prompt": 10, "tokens": tokens, "prompt_seconds": prompt_seconds,
        "seconds": seconds, "decoded": len(tokens) - 1, "drafted": 0, "steps": len(tokens),
    }  # fmt: skip


def test_the_best_mode_is_what_a_policy_is_compared_with() -> None:
    found: dict[str, Any] = {}
    for number in (1, 2):
        calls = [
            call("llama.cpp", "plain", [1, 2, 3, 4, 5], 4.0),
            call("llama.cpp", "lookup:2", [1, 2, 3, 4, 5], 2.0),
            call("llama.cpp", "perfect:4", [1, 2, 3, 4, 5], 0.1),
            call("q8_0", "plain", [1, 2, 3, 9, 9], 2.0, 0.5),
            call("q8_0", "online", [1, 2, 3, 9, 8], 1.0),
        ]
        found[f"x/4 tokens/prompt {number}"] = {"found": calls[:1], "others": 0.9}
        found[f"x/5 tokens/prompt {number}"] = {"found": calls, "others": 0.01 * number}
    found["x/forwards"] = {"found": {"q8_0": {"1": [1.0, 2.0, 3.0], "5": [3.0]}}, "others": 0.0}
    row = summarise("x", found)
    assert row["others"] == 0.02
    assert row["best_mode"] == "lookup:2"
    assert row["ratios"]["q8_0 plain"] == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    assert row["ratios"]["q8_0 online"]["ratio"] == 2.0
    assert row["ratios"]["q8_0 prompt"]["ratio"] == 2.0
    assert row["agreement"] == {"q8_0": 0.6}
    assert row["differing"] == {"llama.cpp": 0, "q8_0": 2}
    assert "T(5) 3000.0 ms (1.50)" in show([row])
    assert "2.00 [2.00, 2.00] of llama.cpp lookup:2" in show([row])
    assert summarise("y", found)["prompts"] == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--shape", "7b"],
        ["--formats", "q4_k"],
        ["--modes", "draft:4"],
        ["--modes", "plain,draft"],
        ["--modes", "plain,lookup:0"],
        ["--modes", "plain,draft:4:2"],
        ["--policies", "nobody"],
        ["--seconds", "nan"],
        ["--busy", "-1"],
    ],
)
def test_bad_settings_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_without_llama_cpp_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main([]) == 2
    said = capsys.readouterr().err.strip()
    assert "[peers]" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    for name, value in {"ROUNDS": 1, "FORWARDS": 2, "TRIALS": 1, "TRIAL_TOKENS": 4, "PAUSE": 0.0}.items():
        monkeypatch.setattr(turns, name, value)


@needs_peer
@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_both_engines_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--shape", "tiny", "--formats", "f16", "--prompts", "2", "--max-new-tokens", "12", "--runs", "1"]
    flags += ["--files", str(tmp_path), "--out", str(tmp_path / "turns.jsonl"), "--threads", "1", "--json"]
    assert main([*flags, "--seconds", "1e-9"]) == 0
    assert "out of time" in capsys.readouterr().err
    assert main(flags) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["prompts"] == 2
    assert row["differing"] == {"llama.cpp": 0, "f16": 0}
    assert row["agreement"]["f16"] > 0.5
    assert set(row["ratios"]) == {"f16 plain", "f16 prompt", "f16 perfect:4"}
    assert set(row["forwards"]["llama.cpp"]) == {"1", "2", "5", "9"}
    assert row["memory"]["llama.cpp"]["peak"] < row["memory"]["f16"]["peak"]
    assert main(flags) == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["rows"] == [row]
    assert "prompt" not in again.err  # nothing is measured twice


@needs_peer
@pytest.mark.slow
def test_llama_cpp_speculates_with_the_default_draft(tmp_path: Path) -> None:
    draft = made(tmp_path / "draft.gguf", write_draft)
    with torch.no_grad():
        own = load_shipped_draft(prepare(DEFAULT_PAIR), torch.device("cpu"), full_head=True)[0]
        likeliest = int(own(torch.tensor([PROMPT * 4])).logits[0, -1].argmax())
    worker = Worker("peer", file=str(draft), draft=str(draft), length=128, threads=1)
    try:
        plain = worker.ask("generate", prompt=PROMPT * 4, tokens=16, mode="plain")
        assert plain["tokens"][0] == likeliest
        for mode in ("lookup:3", "draft:3", "draft:4:0.5", "perfect:3"):
            out = worker.ask("generate", prompt=PROMPT * 4, tokens=16, mode=mode, text=plain["tokens"])
            assert out["tokens"] == plain["tokens"], mode
        assert worker.ask("generate", prompt=PROMPT * 4, tokens=16, mode="draft:4")["steps"] == 3
    finally:
        worker.close()
