"""Exact traces: the collection against drafting one token after the other, and the file format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, PreTrainedConfig

from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.fingerprint import fingerprint
from speckv_online.models.pairs import LoadedPair, chat_prompt
from speckv_online.profiling.draft_table import draft_table
from speckv_online.profiling.trace_collection import collect_trace
from speckv_online.traces.trace import Trace, load_traces
from tests.support.drafting import one_by_one
from tests.support.tiny_models import EOS, TinyPair, perturbed, tiny_llama

PROMPT = [5, 17, 101, 44, 44, 17, 101, 9]
GAMMA = 16


@pytest.mark.parametrize("noise", [0.0, 0.15, 5.0], ids=["right", "sometimes", "wrong"])
def test_draft_table_is_what_the_drafter_drafts(noise: float) -> None:
    target = tiny_llama()
    drafter = ModelDrafter(perturbed(target, noise), 260)
    trace, _ = collect_trace(target, drafter, PROMPT, 24, level="fp32", eos_ids=())
    drafts, signals = one_by_one(drafter, PROMPT, trace.tokens.tolist(), GAMMA)
    np.testing.assert_array_equal(trace.drafts, drafts)
    np.testing.assert_allclose(trace.signals, signals, atol=2e-3)
    left = np.minimum(GAMMA, np.arange(len(trace), 0, -1))
    if noise == 0:
        np.testing.assert_array_equal(trace.accepted, left)
    else:
        assert (0 < trace.accepted.mean() < left.mean()) if noise < 1 else trace.accepted.mean() < 0.5


def test_draft_table_with_a_reduced_head() -> None:
    head_ids = torch.randperm(260, generator=torch.Generator().manual_seed(0))[:100]
    drafter = ModelDrafter(tiny_llama(seed=3, vocab=260), 260, head_ids)
    drafter.model.lm_head = torch.nn.Linear(64, 100, bias=False).requires_grad_(False)
    tokens = [int(t) for t in np.random.default_rng(0).integers(1, 260, 20)]
    drafts, signals, lookups = draft_table(drafter, PROMPT, tokens, 5)
    assert lookups is None  # every token takes a forward
    want_drafts, want_signals = one_by_one(drafter, PROMPT, tokens, 5)
    np.testing.assert_array_equal(drafts, want_drafts)
    np.testing.assert_allclose(signals, want_signals, atol=2e-3)
    assert set(drafts.ravel()) <= set(head_ids.tolist())


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(
            vocab_size=260,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=6,
            initializer_range=0.2,
        ),
        GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    ],
    ids=["sliding-window", "absolute-positions"],
)
def test_draft_table_of_other_families(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    drafter = ModelDrafter(AutoModelForCausalLM.from_config(config).eval(), 260)
    tokens = [int(t) for t in np.random.default_rng(0).integers(1, 260, 12)]
    drafts, signals, _ = draft_table(drafter, PROMPT, tokens, 8)
    want_drafts, want_signals = one_by_one(drafter, PROMPT, tokens, 8)
    np.testing.assert_array_equal(drafts, want_drafts)
    np.testing.assert_allclose(signals, want_signals, atol=2e-3)


def test_draft_table_refuses_what_does_not_fit() -> None:
    drafter = ModelDrafter(tiny_llama(positions=32), 260)
    with pytest.raises(UserError, match="shorten"):
        draft_table(drafter, PROMPT, list(range(1, 20)))


def test_end_of_sequence_inside_a_draft_counts_as_accepted() -> None:
    target = tiny_llama()
    drafter = ModelDrafter(target, 260)
    whole, _ = collect_trace(target, drafter, PROMPT, 30, level="fp32", eos_ids=())
    eos = next(int(t) for i, t in enumerate(whole.tokens) if i >= 12 and t not in whole.tokens[:i])
    trace, _ = collect_trace(target, drafter, PROMPT, 30, level="fp32", eos_ids=[eos])
    assert trace.finish == "eos"
    assert trace.tokens[-1] == eos
    np.testing.assert_array_equal(trace.tokens, whole.tokens[: len(trace)])
    np.testing.assert_array_equal(trace.accepted, np.minimum(GAMMA, np.arange(len(trace), 0, -1)))


@pytest.fixture
def saved(tiny_pair: TinyPair, tmp_path: Path) -> tuple[Trace, Path]:
    trace, steps = collect_trace(
        tiny_pair.target, tiny_pair.drafter(), PROMPT, 20, level="int8", task="code", prompt_id="code-01",
        split="train", eos_ids=[EOS], meta={"target": "abc"},
    )  # fmt: skip
    assert sum(s.produced for s in steps) == len(trace)
    return trace, trace.save(tmp_path / "int8" / "code-01.npz")


def test_files_round_trip(saved: tuple[Trace, Path]) -> None:
    trace, path = saved
    again = Trace.load(path)
    for name in ("prompt", "tokens", "drafts", "accepted", "signals"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(again, name))
    for name in ("level", "task", "prompt_id", "split", "budget", "finish", "meta"):
        assert getattr(trace, name) == getattr(again, name)
    assert [t.prompt_id for t in load_traces(path.parent.parent, levels=["int8"], splits=["train"])] == ["code-01"]
    with pytest.raises(UserError, match="no traces of nf4"):
        load_traces(path.parent, levels=["nf4"])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda a: a.update(accepted=a["accepted"] + 1), "accepted lengths"),
        (lambda a: a.update(drafts=a["drafts"][:-1]), "shape"),
        (lambda a: a.update(signals=a["signals"] * np.nan), "finite"),
        (lambda a: a.update(head=np.array(str(a["head"]).replace('"version": 1', '"version": 9'))), "version 9"),
        (lambda a: a.update(head=np.array(str(a["head"]).replace("speckv-trace", "other"))), "not a speckv-trace"),
        (lambda a: a.pop("head"), "not a speckv-trace"),
        (lambda a: a.pop("tokens"), "tokens"),
        (lambda a: a.update(tokens=np.array([object()] * 20)), "pickle"),
    ],
    ids=["accepted", "shape", "nan", "version", "format", "other file", "missing", "pickled"],
)
def test_readers_name_the_file_and_the_reason(saved: tuple[Trace, Path], damage: object, reason: str) -> None:
    _, path = saved
    with np.load(path) as file:
        arrays = dict(file)
    damage(arrays)  # type: ignore[operator]
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=reason) as error:
        Trace.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"level": ["a"]}, "level is"),
        ({"task": 1}, "task is 1"),
        ({"meta": None}, "meta is None"),
        ({"budget": 16.5}, "budget is 16.5"),
    ],
)
def test_heads_of_other_types_are_refused(saved: tuple[Trace, Path], head: dict[str, Any], said: str) -> None:
    trace, path = saved
    broken = replace(trace, **head)
    broken.save(path.with_name("broken.npz"))
    with pytest.raises(UserError, match="delete it, and collect it again") as caught:
        Trace.load(path.with_name("broken.npz"))
    assert said in str(caught.value)


def test_what_there_is_instead_is_said(saved: tuple[Trace, Path]) -> None:
    trace, path = saved
    with pytest.raises(UserError, match=f"no traces of int3 nowhere in .*: it has {trace.level} of the split"):
        load_traces(path, levels=["int3"], splits=["nowhere"])


def test_other_files_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK\x03\x04 nothing of use")
    for path, reason in ((bad, "not a usable trace"), (tmp_path / "none.npz", "no trace file")):
        with pytest.raises(UserError, match=reason):
            Trace.load(path)


def test_a_failed_write_leaves_nothing_behind(saved: tuple[Trace, Path], tmp_path: Path) -> None:
    trace, _ = saved
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        trace.save(tmp_path / "file" / "trace.npz")
    (tmp_path / "taken.npz").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        trace.save(tmp_path / "taken.npz")
    assert not list(tmp_path.glob(".*"))


def test_fingerprints_tell_models_apart() -> None:
    model = tiny_llama()
    assert fingerprint(model) == fingerprint(tiny_llama())
    assert fingerprint(model) != fingerprint(perturbed(model, 0.01))


@pytest.mark.slow
def test_real_pair_drafts_as_traced(real_pair: LoadedPair) -> None:
    prompt = chat_prompt(real_pair.tokenizer, "What is a prime number?")
    trace, _ = collect_trace(real_pair.target, real_pair.drafter, prompt, 16, level="fp32")
    drafts, signals = one_by_one(real_pair.drafter, prompt, trace.tokens.tolist(), GAMMA)
    np.testing.assert_array_equal(trace.drafts, drafts)
    np.testing.assert_allclose(trace.signals, signals, atol=1e-2, rtol=1e-3)
