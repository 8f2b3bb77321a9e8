"""The speckv command: what it prints, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from policies.acceptance.mlp16 import HIDDEN, SHAPES
from speckv_online.cli.app import main
from speckv_online.cli.generate import Streamer
from speckv_online.console import run_command
from speckv_online.errors import UserError
from tests.support.cli import Run
from tests.support.engine import SUPPORTED
from tests.support.tiny_models import TinyPair, loaded_after, tiny_tokenizer


@pytest.fixture
def pair_flags(tiny_pair: TinyPair) -> list[object]:
    return ["--target", tiny_pair.target_dir, "--draft", tiny_pair.draft_dir, "--threads", 1, "--device", "cpu"]


def test_generate_prints_json(speckv: Run, pair_flags: list[object]) -> None:
    code, out, _ = speckv(
        "generate", *pair_flags, "--prompt", "hello", "--policy", "fixed:3", "--max-new-tokens", 20, "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert 0 < facts["tokens"] <= 20
    assert facts["tokens"] == len(facts["token_ids"]) == sum(facts["accepted_per_step"]) + facts["steps"]
    assert len(facts["gamma_per_step"]) == len(facts["accepted_per_step"]) == facts["steps"]
    assert max(facts["gamma_per_step"]) == 3
    assert all(n <= k for n, k in zip(facts["accepted_per_step"], facts["gamma_per_step"], strict=True))
    seconds = facts["seconds"]
    assert seconds["draft"] + seconds["verify"] + seconds["decide"] <= seconds["decode"] < seconds["total"]
    assert facts["tokens_per_second"] == pytest.approx(facts["tokens"] / seconds["decode"])
    assert facts["compression"] == "fp16"


@pytest.mark.parametrize("engine", ["auto", "off"])
def test_generate_says_whether_the_engine_is_on(speckv: Run, pair_flags: list[object], engine: str) -> None:
    request = ["generate", *pair_flags, "--prompt", "hello", "--max-new-tokens", 4, "--engine", engine, "--json"]
    code, out, err = speckv(*request)
    assert (code, err) == (0, "")
    found = json.loads(out)["engine"]
    assert found.keys() == {"target", "draft"}
    for status in found.values():
        assert status["on"] == (engine == "auto" and SUPPORTED)
        assert ("switched off" in status["reason"]) == (engine == "off")


def test_an_unknown_engine_is_one_line(speckv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = speckv("generate", "--prompt", "hi", "--engine", "on")
    assert (code, out) == (2, "")
    assert err == "speckv: error: --engine must be auto or off, got 'on'\n"
    monkeypatch.setenv("SPECKV_ENGINE", "fast")
    assert speckv("generate", "--prompt", "hi")[2] == "speckv: error: $SPECKV_ENGINE must be auto or off, got 'fast'\n"


def test_a_policy_is_found_in_the_working_directory(
    speckv: Run, pair_flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine_only_here"
    folder.mkdir()
    (folder / "three.py").write_text("from policies.fixed import Fixed\n\nclass Three(Fixed):\n    pass\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    request = ["generate", *pair_flags, "--prompt", "hi", "--max-new-tokens", 6, "--policy"]
    monkeypatch.chdir(tmp_path)
    code, out, _ = speckv(*request, "mine_only_here.three:Three:gamma=3", "--json")
    assert code == 0
    assert max(json.loads(out)["gamma_per_step"]) == 3


def test_text_is_the_same_whatever_the_policy_and_ends_with_a_summary(speckv: Run, pair_flags: list[object]) -> None:
    flags = ["generate", *pair_flags, "--prompt", "hello", "--max-new-tokens", 16, "--compression", "fp32"]
    plain = json.loads(speckv(*flags, "--policy", "autoregressive", "--json")[1])
    code, out, _ = speckv(*flags, "--policy", "fixed:4")
    text, summary = out.rstrip("\n").rsplit("\n", 1)
    assert code == 0
    assert text == plain["text"]
    assert summary.startswith(f"[{plain['tokens']} tokens in ")
    assert "tokens/s (measured)" in summary
    assert summary.endswith("fp32, fixed:4]")


def test_the_prompt_can_come_from_standard_input(
    speckv: Run, pair_flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["generate", *pair_flags, "--max-new-tokens", 8, "--policy", "fixed:1", "--json"]
    direct = json.loads(speckv(*flags, "--prompt", "hello")[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    piped = json.loads(speckv(*flags, "--prompt", "-")[1])
    assert piped["token_ids"] == direct["token_ids"]


def test_streaming_holds_back_half_a_character() -> None:
    tokenizer, out = tiny_tokenizer(), io.StringIO()
    streamer = Streamer(tokenizer, out)
    shown = []
    for token in tokenizer("añ→b").input_ids:
        streamer([token])
        shown.append(out.getvalue())
    streamer.end()
    assert out.getvalue() == "añ→b\n"
    assert all("añ→b".startswith(s) for s in shown)
    assert shown[0] == "a"
    assert shown[1] == "a"


def test_streaming_goes_on_after_bytes_that_are_no_character() -> None:
    """As of Llama 2: a run of bytes that turns out to be invalid is replaced as a whole, what was shown of it too."""
    model = models.BPE(vocab={"x": 0, "<0xC3>": 1, "<0xA9>": 2, "y": 3}, merges=[], byte_fallback=True)
    inner = Tokenizer(model)
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer, out = PreTrainedTokenizerFast(tokenizer_object=inner), io.StringIO()
    streamer = Streamer(tokenizer, out)
    for token in [0, 1, 2, 1, 0, 3, 3]:
        streamer([token])
    streamer.end()
    assert out.getvalue().startswith("xé")
    assert out.getvalue().endswith("xyy\n")


def test_policies_and_models_are_listed(speckv: Run) -> None:
    code, out, _ = speckv("policies")
    assert code == 0
    table, notes = out.split("\n\n")
    heads = [line for line in table.splitlines() if not line.startswith(" ")]
    assert {"autoregressive", "fixed", "mlp16", "online"} <= {line.split()[0] for line in heads}
    assert all(len(line.split()) > 2 for line in heads)
    rows = json.loads(speckv("policies", "--json")[1])
    assert [row["name"] for row in rows] == [line.split()[0] for line in heads]
    under = table.splitlines()[table.splitlines().index(next(h for h in heads if h.startswith("hf-heuristic"))) + 1]
    assert under.split() == ["start=5,", "transient=off"]
    found = next(row["options"] for row in rows if row["name"] == "fixed")
    assert found == {"gamma": {"type": "a whole number", "default": 4}}
    assert "safety_gamma=4" in notes
    assert "online" in notes
    code, out, _ = speckv("models")
    assert code == 0
    assert out.startswith("smollm2: ")
    assert json.loads(speckv("models", "--json")[1])[0]["name"] == "smollm2"


def mistakes(tmp_path: Path, tiny_pair: TinyPair) -> dict[str, tuple[list[object], str]]:
    """Name -> (flags that replace the good ones, part of the message)."""
    other = tmp_path / "other"
    tiny_pair.draft.save_pretrained(other)
    tiny_tokenizer(words=3).save_pretrained(other)
    arrays = {key: np.zeros(shape) for key, shape in SHAPES.items()}
    np.savez(tmp_path / "wrong.npz", **(arrays | {"W1": np.zeros((5, HIDDEN))}))
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(arrays))
    (tmp_path / "renamed.npz").write_bytes(pickle.dumps(arrays))
    return {
        "policy": (["--policy", "fixd:4"], "unknown policy 'fixd'"),
        "policy option": (["--policy", "fixed:40"], "gamma must be from 0 to 16"),
        "level": (["--compression", "int3"], "unknown compression level 'int3'"),
        "pair": (["--pair", "gpt9", "--target", "", "--draft", ""], "gpt9"),
        "model": (["--target", tmp_path / "absent"], "no model folder"),
        "draft alone": (["--target", ""], "go together"),
        "tokenizers": (["--draft", other], "different tokenizers"),
        "shapes": (["--policy", f"mlp16:weights={tmp_path / 'wrong.npz'}"], "W1 has shape (5, 16)"),
        "pickle": (["--policy", f"mlp16:weights={tmp_path / 'weights.pkl'}"], "pickles are refused"),
        "renamed pickle": (["--policy", f"mlp16:weights={tmp_path / 'renamed.npz'}"], "pickles are refused"),
        "device": (["--device", "tpu9"], "device"),
        "tokens": (["--max-new-tokens", 0], "--max-new-tokens must be at least 1"),
        "threads": (["--threads", -1], "--threads"),
        "prompt": (["--prompt", " "], "the prompt is empty"),
        "long prompt": (["--prompt", "x" * 600], "shorten it"),
        "bytes": (["--prompt", "hello\udcff"], "not UTF-8"),
    }


def test_every_mistake_is_one_line_and_exit_code_2(
    speckv: Run, pair_flags: list[object], tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = mistakes(tmp_path, tiny_pair)
    capsys.readouterr()  # saving a model shows a bar
    for name, (flags, message) in cases.items():
        good = {"--prompt": "hello", "--policy": "fixed:1", "--max-new-tokens": 4}
        given = good | dict(zip(pair_flags[::2], pair_flags[1::2], strict=True))
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        arguments = [x for key, value in given.items() if value != "" for x in (key, value)]
        code, out, err = speckv("generate", *arguments)
        assert (code, out) == (2, ""), name
        assert err.startswith("speckv: error: "), name
        assert message in err, name
        assert err.count("\n") == 1, name
        assert "Traceback" not in err, name


def test_other_commands_refuse_in_the_same_way(speckv: Run, tmp_path: Path) -> None:
    for arguments in (["models", "prepare", "gpt9"], ["report", tmp_path], ["report", tmp_path / "absent"]):
        code, _, err = speckv(*arguments)
        assert code == 2
        assert err.splitlines()[-1].startswith("speckv: error: ")
        assert "Traceback" not in err
    assert speckv("generate")[0] == 2  # no prompt: argparse's own message
    assert speckv("dance")[0] == 2
    assert speckv("--help")[0] == 0


def test_a_closed_output_is_no_error() -> None:
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(
            f"{sys.executable} -m speckv_online.cli policies {closed}", shell=True, capture_output=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, b""), closed


def test_bytes_on_standard_input_are_one_line(speckv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for errors in ("strict", "surrogateescape"):  # which one is a matter of the locale
        stdin = io.TextIOWrapper(io.BytesIO(b"hello\xff"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = speckv("generate", "--prompt", "-")
        assert (code, out, err) == (2, "", "speckv: error: the prompt is not UTF-8 text: save it as UTF-8\n")


def test_an_output_without_greek_letters_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run_command("speckv", lambda: print("mean γ")) == 0
    assert raw.getvalue() == b"mean ?\n"


def test_a_home_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--target", "~no-such-user/x", "--draft", "x"]) == 2
    assert "~ and a user that is not known here" in capsys.readouterr().err


def test_errors_of_the_system_are_one_line_and_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        with open("/dev/full", "w") as f:
            f.write("x")

    assert run_command("speckv", full) == 2
    assert capsys.readouterr().err == "speckv: error: No space left on device\n"

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_command("speckv", interrupted) == 130

    class Remote(Exception):  # what Ray does to an actor's error
        cause = UserError("first\nsecond")

    def remote() -> None:
        raise Remote("a long traceback")

    capsys.readouterr()
    assert run_command("speckv", remote) == 2
    assert capsys.readouterr().err == "speckv: error: first second\n"

    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("speckv", bug)


def test_help_imports_nothing_heavy() -> None:
    code = "from speckv_online.cli.app import build_parser; build_parser().format_help()"
    assert not loaded_after(code, "torch", "numpy", "transformers", "ray", "matplotlib")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m speckv_online.cli policies | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(("level", "policy"), [("fp16", "fixed:4"), ("int8", "mlp16"), ("nf4", "online")])
def test_the_real_pair_generates(speckv: Run, level: str, policy: str) -> None:
    code, out, err = speckv(
        "generate", "--prompt", "What is the capital of France?", "--compression", level, "--policy", policy,
        "--max-new-tokens", 8, "--json",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(out)
    assert "Paris" in facts["text"]
    assert facts["compression"] == level
