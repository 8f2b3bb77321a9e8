"""Traces of conversations that the target wrote itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.distill.data import ANSWER, FORCED, USER
from experiments.profile.conversations import check_conversation, main
from speckv_online.errors import UserError
from speckv_online.models.pairs import chat_prompt, load_tokenizer, prepare
from speckv_online.models.smollm2 import smollm2_ready
from speckv_online.traces.trace import load_traces
from tests.support.made_traces import made_trace


def test_a_folder_without_shards_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conversations", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "--conversations wants a folder of shards" in capsys.readouterr().err


def test_other_settings_and_conversations_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shard-00000.npz").touch()
    trace, file = made_trace(0), tmp_path / "out" / "conversations" / "00000.npz"
    trace.meta["request"] = {"pair": "smollm2", "drafter": "model"}
    trace.save(file)
    assert main(["--conversations", "~", "--out", "~/out", "--drafter", "hybrid"]) == 2
    assert "holds traces collected with drafter 'model', not 'hybrid'" in capsys.readouterr().err
    check_conversation(file, trace.prompt, trace.tokens)
    for prompt, tokens in ((trace.prompt[1:], trace.tokens), (trace.prompt, trace.tokens + 1)):
        with pytest.raises(UserError, match="another conversation"):
            check_conversation(file, prompt, tokens)


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_ready(), reason="the default pair is not prepared")
def test_conversations_become_traces(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(prepare("smollm2")))
    prompt = chat_prompt(tokenizer, "Name a colour.")
    answer = [*tokenizer("A colour is blue.", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    start = next(i for i, t in enumerate(prompt) if tokenizer.decode([t]) == "Name")
    ids = prompt[start:] + answer
    role = [FORCED, *[USER] * (len(prompt) - start - 1), *[ANSWER] * len(answer)]
    np.savez(
        tmp_path / "shard-00000.npz", ids=np.array(ids, np.uint16), role=np.array(role, np.uint8),
        hidden=np.zeros((len(ids), 4), np.float16), offsets=np.array([0, len(ids)]), task=np.array(["chat"]),
    )  # fmt: skip
    arguments = ["--conversations", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 0  # what is there is kept
    (trace,) = load_traces(tmp_path / "out")
    assert trace.prompt.tolist() == prompt
    assert trace.tokens.tolist() == answer
    assert trace.finish == "eos"
    assert trace.drafts.shape == (len(answer), 16)
