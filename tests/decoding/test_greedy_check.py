"""The command that checks losslessness, on a tiny pair and, under ``slow``, on the real one."""

from __future__ import annotations

import json

import pytest
import torch

from experiments import lossless
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.generation import Generation
from speckv_online.models.pairs import LoadedPair
from tests.support.tiny_models import TinyPair


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return json.loads(capsys.readouterr().out)["rows"]


def test_a_tiny_pair_is_lossless(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--target", str(tiny_pair.target_dir), "--draft", str(tiny_pair.draft_dir), "--device", "cpu"]
    args = ["--levels", "fp32,nf4", "--policies", "fixed:3,fixed:8", "--prompts", "2"]
    args += ["--max-new-tokens", "16", "--json"]
    assert lossless.main([*pair, *args]) == 0
    found = rows(capsys)
    assert [(r["level"], r["policy"]) for r in found] == [
        (level, policy) for level in ("fp32", "nf4") for policy in ("autoregressive", "fixed:3", "fixed:8")
    ]
    assert all(r["ties"] == 0 for r in found if r["level"] == "fp32")
    assert all(r["tokens"] > 0 and r["faults"] == 0 for r in found)


def test_a_wrong_token_is_found(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = SpeculativeDecoder.generate

    def lying(self: SpeculativeDecoder, *args: object, **kwargs: object) -> Generation:
        out = honest(self, *args, **kwargs)  # type: ignore[arg-type]
        out.tokens[-1] = out.tokens[-1] % 200 + 1
        return out

    monkeypatch.setattr(SpeculativeDecoder, "generate", lying)
    pair = ["--target", str(tiny_pair.target_dir), "--draft", str(tiny_pair.draft_dir), "--device", "cpu"]
    args = ["--levels", "fp32", "--policies", "fixed:3", "--prompts", "1", "--max-new-tokens", "8", "--json"]
    assert lossless.main([*pair, *args]) == 1
    assert not any(r["ok"] for r in rows(capsys))


def test_the_reference_is_another_target(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target whose engine is wrong does not agree with itself."""
    honest = lossless.load_pair

    def damaged(*args: object, **kwargs: object) -> LoadedPair:
        pair = honest(*args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            pair.target.lm_head.weight[::2] *= 0.5
        return pair

    monkeypatch.setattr(lossless, "load_pair", damaged)
    pair = ["--target", str(tiny_pair.target_dir), "--draft", str(tiny_pair.draft_dir), "--device", "cpu"]
    args = ["--levels", "fp32", "--policies", "fixed:3", "--prompts", "1", "--max-new-tokens", "8", "--json"]
    assert lossless.main([*pair, *args]) == 1
    assert not any(r["ok"] for r in rows(capsys))


@pytest.mark.slow
def test_the_real_pair_is_lossless(capsys: pytest.CaptureFixture[str]) -> None:
    policies = "fixed:1,fixed:4,fixed:8,mlp16,online"
    assert lossless.main(["--policies", policies, "--prompts", "1", "--max-new-tokens", "12", "--json"]) == 0
    found = rows(capsys)
    assert len(found) == 24
    assert all(r["ties"] == 0 for r in found if r["level"] == "fp32")


def test_a_lost_token_is_found(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = SpeculativeDecoder.generate

    def losing(self: SpeculativeDecoder, *args: object, **kwargs: object) -> Generation:
        out = honest(self, *args, **kwargs)  # type: ignore[arg-type]
        del out.tokens[5:]
        return out

    monkeypatch.setattr(SpeculativeDecoder, "generate", losing)
    pair = ["--target", str(tiny_pair.target_dir), "--draft", str(tiny_pair.draft_dir), "--device", "cpu"]
    args = ["--levels", "fp32", "--policies", "fixed:3", "--prompts", "1", "--max-new-tokens", "8", "--json"]
    assert lossless.main([*pair, *args]) == 1
    assert [(r["short"], r["ok"]) for r in rows(capsys)] == [(1, False)] * 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--levels", ""], ["--policies", ""], ["--prompts", "0"], ["--max-new-tokens", "0"], ["--seed", "-1"],
        ["--threads", "-1"], ["--threads", "99999999"], ["--levels", "fp32,int3"], ["--policies", "fixd:4"],
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_loaded(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lossless, "load_pair", None)
    assert lossless.main(flags) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
