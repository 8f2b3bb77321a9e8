"""What a user may hand over by mistake: one clear line each; and stop strings, wherever they are asked for."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from speckv_online.cli.app import main
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.hf_assistant import PolicyAssistant
from speckv_online.errors import UserError
from speckv_online.models.pairs import chat_prompt
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.generate import decoder_of, inputs_of
from tests.support.tiny_models import TinyPair, tiny_tokenizer


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=260, decoder_start_token_id=0)
    ).eval()


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(
        MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1, state_size=4, pad_token_id=0, eos_token_id=0)
    ).eval()


def one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (torch.tensor([[5, 6, 7]]), "two dimensions"),
        ([[5, 6], [7, 8]], "two dimensions"),
        ([torch.tensor([5, 6])], "two dimensions"),
        (np.ones((2, 3), int), "two dimensions"),
        ("hello", "input_ids"),
        (["5", "6"], "whole numbers"),
        ([1.5, 2.0], "'1.5'"),
        (torch.tensor([1.0, 2.0]), "whole numbers"),
        ([1, None], "'None'"),
        (7, "list of token ids"),
        (None, "list of token ids"),
        ([], "empty"),
    ],
    ids=str,
)
def test_prompts(tiny_pair: TinyPair, prompt: Any, reason: str) -> None:
    decoder = SpeculativeDecoder(tiny_pair.draft, policy="fixed:2", target=tiny_pair.target)
    with pytest.raises(UserError, match=reason) as error:
        decoder.generate(prompt, 3)
    assert one_line(error)
    if prompt is not None and not isinstance(prompt, int):
        with pytest.raises(UserError, match=reason):
            decoder.decode_batch([[1, 2], prompt], 3)


def test_batch_encodings(tiny_pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(tiny_pair.draft, policy="fixed:2", target=tiny_pair.target)
    encoded = tiny_pair.tokenizer("hello")
    with pytest.raises(UserError, match="give its input_ids"):
        decoder.generate(encoded, 3)
    expected = plain(tiny_pair.target, list(encoded.input_ids), 3)
    for ids in (encoded.input_ids, np.array(encoded.input_ids), torch.tensor(encoded.input_ids)):
        assert decoder.generate(ids, 3).tokens == expected


@pytest.mark.parametrize("budget", [-1, 1.5, "3", None])
def test_budgets(tiny_pair: TinyPair, budget: Any) -> None:
    decoder = SpeculativeDecoder(tiny_pair.draft, policy="fixed:2", target=tiny_pair.target)
    for call in (lambda: decoder.generate([1, 2], budget), lambda: decoder.decode_batch([[1, 2]], budget)):
        with pytest.raises(UserError, match="max_new_tokens must be a whole number"):
            call()
    assert decoder.generate([1, 2], np.int64(2)).tokens == plain(tiny_pair.target, [1, 2], 2)
    assert decoder.generate([1, 2], 0).tokens == []


@pytest.mark.parametrize(
    ("policy", "reason"), [(None, "got None"), (Scripted, "the class Scripted: call it"), (4, "got 4")], ids=str
)
def test_policies(tiny_pair: TinyPair, policy: Any, reason: str) -> None:
    for make in (lambda: SpeculativeDecoder(tiny_pair.draft, policy=policy), lambda: PolicyAssistant(policy)):
        with pytest.raises(UserError, match=reason) as error:
            make()
        assert one_line(error)


def test_drafts_and_targets(tiny_pair: TinyPair) -> None:
    target, draft = tiny_pair.target, tiny_pair.draft
    for wrong, reason in (
        (torch.compile(draft), "torch.compile"),
        (tiny_pair.tokenizer, "a loaded model, a drafter or None"),
        (t5(), "draft is an encoder-decoder"),
        (mamba(), "draft has"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            target.generate(**inputs_of([5, 6]), custom_generate=SpeculativeDecoder(wrong, policy="fixed:2"))
        assert one_line(error)
    for wrong, reason in (
        (torch.compile(target), "torch.compile"),
        ("org/name", "got str"),
        (t5(), "target is an encoder-decoder"),
        (mamba(), "target has"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            SpeculativeDecoder(draft, policy="fixed:2", target=wrong)
        assert one_line(error)
    for model, reason in ((t5(), "target is an encoder-decoder"), (mamba(), "target has")):
        with pytest.raises(UserError, match=reason):
            model.generate(torch.tensor([[5, 6]]), custom_generate=SpeculativeDecoder(None, policy="fixed:2"))


def test_models_are_refused_by_commands_before_they_are_read(
    tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, model in (("t5", t5()), ("mamba", mamba())):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        for file in (tmp_path / name).glob("*.safetensors"):
            file.unlink()  # nobody reads as far
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    good = str(tiny_pair.target_dir)
    for target, draft, reason in (
        ("./t5", good, "the target is an encoder-decoder model"),
        (good, "./t5", "the draft is an encoder-decoder model"),
        ("./mamba", good, "the target has"),
        (good, "./mamba", "the draft has"),
        ("model.gguf", good, "cannot read model.gguf: it ends within its header"),
        (str(tmp_path / "model.gguf"), good, "model.gguf: it ends within its header"),
        (good, "elsewhere.gguf", "cannot read elsewhere.gguf: No such file"),
        (good, f"{good}/config.json", "it is a file"),
    ):
        code = main(["generate", "--prompt", "hi", "--max-new-tokens", "3", "--target", target, "--draft", draft])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert [line for line in lines if not line.startswith("loading")] == lines[-1:]
        assert reason in lines[-1]


def test_a_chat_template_that_raises(tiny_pair: TinyPair) -> None:
    tokenizer = copy.deepcopy(tiny_pair.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('only\nsystem messages') }}"
    with pytest.raises(UserError, match="chat template fails on a user's message: only system messages") as error:
        chat_prompt(tokenizer, "hi")
    assert one_line(error)


@pytest.mark.parametrize("where", ["argument", "config", "model"])
@pytest.mark.parametrize("tokenizer", ["decoder", "generate", "nobody"])
def test_stop_strings(tiny_pair: TinyPair, where: str, tokenizer: str) -> None:
    target, known = copy.deepcopy(tiny_pair.target), tiny_pair.tokenizer
    prompt = prompt_of(10, 4)
    whole = [known.decode([t]) for t in plain(tiny_pair.target, prompt, 20)]
    word = next(text for text in whole[3:] if text.isascii())
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    if where == "argument":
        options["stop_strings"] = [word]
    elif where == "config":
        options = {"generation_config": GenerationConfig(**options, stop_strings=word, eos_token_id=0, pad_token_id=0)}
    else:
        target.generation_config.stop_strings = [word]
    expected = target.generate(**inputs_of(prompt), tokenizer=known, **options)
    assert expected.shape[1] < 30
    decoder = decoder_of(tiny_pair, [8], **{"tokenizer": known} if tokenizer == "decoder" else {})
    if tokenizer == "generate":
        options["tokenizer"] = known
    if tokenizer == "nobody":
        with pytest.raises(UserError, match=r"tokenizer=\.\.\.") as error:
            target.generate(**inputs_of(prompt), custom_generate=decoder, **options)
        assert one_line(error)
        return
    assert torch.equal(target.generate(**inputs_of(prompt), custom_generate=decoder, **options), expected)
    assert decoder.totals.drafted


def test_stop_strings_of_a_call_replace_those_of_the_model(tiny_pair: TinyPair) -> None:
    target, prompt = copy.deepcopy(tiny_pair.target), prompt_of(10, 4)
    whole = [tiny_pair.tokenizer.decode([t]) for t in plain(tiny_pair.target, prompt, 20)]
    target.generation_config.stop_strings = [next(text for text in whole[3:] if text.isascii())]
    decoder = decoder_of(tiny_pair, tokenizer=tiny_pair.tokenizer)
    out = target.generate(
        **inputs_of(prompt), custom_generate=decoder, stop_strings=["never said"], do_sample=False, max_new_tokens=20
    )
    assert out.shape[1] == 30


@pytest.mark.parametrize("tokenizer", [True, False])
def test_token_healing_needs_a_pad_token(tiny_pair: TinyPair, tokenizer: bool) -> None:
    assert tiny_pair.tokenizer.pad_token is None
    options: dict[str, Any] = {"tokenizer": tiny_pair.tokenizer} if tokenizer else {}
    with pytest.raises(UserError, match="pad token"):
        tiny_pair.target.generate(
            **inputs_of([5, 6]), custom_generate=decoder_of(tiny_pair), token_healing=True, max_new_tokens=4, **options
        )


def test_the_signatures_stay_readable(tiny_pair: TinyPair) -> None:
    assert "policy" in inspect.signature(SpeculativeDecoder).parameters
    assert "stop_strings" in inspect.signature(decoder_of(tiny_pair)).parameters
