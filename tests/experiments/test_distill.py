"""Distillation on a tiny random Llama: generation, training and export, each for real."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.common.bundled_prompts import bundled
from experiments.distill.data import (
    ANSWER,
    FORCED,
    USER,
    Conversations,
    choose_head_ids,
    load_conversations,
    make_batch,
    plan_batches,
)
from experiments.distill.draft import Draft, distillation_loss
from experiments.distill.export import export_draft
from experiments.distill.generate import count_answers, generate
from experiments.distill.ragged import RaggedLlama
from experiments.distill.seeds import SEEDS
from experiments.distill.settings import Settings
from experiments.distill.train import load_checkpoint, train
from speckv_online.models.distilled_draft import load_shipped_draft
from tests.support.tiny_models import EOS, tiny_llama, tiny_tokenizer

PREFIX = [5, 6, 7]
SETTINGS = Settings(kept_layers=(0, 2), head_size=260, epochs=4, batch_tokens=1500, holdout_every=10)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    model = tiny_llama(vocab=300, positions=2048)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer(words=43)
    tokenizer.chat_template = (
        "sys:{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}\n{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def conversations(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    sizes: dict[str, Any] = {"slots": 16, "max_user": 12, "max_answer": 24, "shard_tokens": 700}
    generate(target, tokenizer, folder, answer_tokens=1000, **sizes)
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    generate(target, tokenizer, folder, answer_tokens=2500, **sizes)
    # Going on adds shards and leaves those that exist alone.
    assert len(list(folder.iterdir())) > len(first)
    assert all((folder / name).read_bytes() == content for name, content in first.items())
    return folder


def test_ragged_llama_agrees_with_transformers(target: PreTrainedModel) -> None:
    torch.manual_seed(0)
    rows = [torch.randint(1, 300, (n,)) for n in (9, 4, 13)]
    starts = [0, 2, 5]  # the slots begin at different times, so their positions differ within a step
    net = RaggedLlama(target, slots=3, max_len=32)
    got: list[list[torch.Tensor]] = [[], [], []]
    with torch.inference_mode():
        for t in range(20):
            at = [min(max(t - s, 0), len(r) - 1) for r, s in zip(rows, starts, strict=True)]
            hidden = net.step(torch.tensor([int(r[i]) for r, i in zip(rows, at, strict=True)]), torch.tensor(at))
            logits = net.logits(hidden)
            for i, (r, s) in enumerate(zip(rows, starts, strict=True)):
                if s <= t < s + len(r):
                    got[i].append(logits[i])
        for row, parts in zip(rows, got, strict=True):
            torch.testing.assert_close(torch.stack(parts), target(row[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_shards_hold_whole_greedy_conversations(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Path
) -> None:
    data = load_conversations(conversations)
    assert count_answers(conversations) == (data.role == ANSWER).sum() >= 2500
    assert len(data.ids) == len(data.role) == len(data.hidden) == data.offsets[-1]
    assert not data.hidden[data.role == FORCED].any()
    prefix = tokenizer("sys:").input_ids
    openings = {tuple(tokenizer(s).input_ids) for group in SEEDS.values() for s in group}
    for i in range(0, len(data), 7):
        part = slice(data.offsets[i], data.offsets[i + 1])
        ids, role, hidden = data.ids[part].astype(int), data.role[part], data.hidden[part]
        first_pick = int(np.flatnonzero(role != FORCED)[0])
        assert tuple(ids[:first_pick]) in openings
        assert role[first_pick] == USER
        assert role[-1] == ANSWER
        with torch.no_grad():
            out = target(torch.tensor([[*prefix, *ids]]), output_hidden_states=True)
        answer = np.flatnonzero(role == ANSWER)
        states = out.hidden_states[-1][0, len(prefix) - 1 + answer]
        np.testing.assert_allclose(hidden[answer], states.numpy(), atol=2e-2)
        top2 = out.logits[0, len(prefix) - 1 + answer].topk(2)
        sure = (top2.values[:, 0] - top2.values[:, 1] > 1e-3).numpy()
        np.testing.assert_array_equal(ids[answer][sure], top2.indices[:, 0].numpy()[sure])


def _draft(target: PreTrainedModel, data: Conversations) -> Draft:
    return Draft(target, SETTINGS.kept_layers, choose_head_ids(data, 300, SETTINGS.head_size, [EOS]))


def test_training_learns_and_resumes(target: PreTrainedModel, conversations: Path, tmp_path: Path) -> None:
    data = load_conversations(conversations)
    whole = _draft(target, data)
    notes = train(whole, data, PREFIX, SETTINGS, tmp_path / "whole.safetensors", save_every=7, validate_every=5)
    assert notes["log"][-1][1] < notes["log"][0][1]  # loss
    assert notes["log"][-1][2] > notes["log"][0][2]  # held-out accuracy
    assert notes["step"] == notes["total"]

    half = tmp_path / "half.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(
            _draft(target, data),
            _Interrupting(data, notes["total"] // 2),
            PREFIX,
            SETTINGS,
            half,
            save_every=3,
            validate_every=5,
        )
    stopped = load_checkpoint(half)[1]["step"]
    assert 0 < stopped < notes["total"]
    resumed = _draft(target, data)
    again = train(resumed, data, PREFIX, SETTINGS, half, save_every=7, validate_every=5)
    assert again["step"] == notes["step"]
    assert train(resumed, data, PREFIX, SETTINGS, half)["step"] == notes["step"]  # complete: nothing is added
    for name, p in whole.trained().items():
        torch.testing.assert_close(resumed.trained()[name], p, atol=1e-4, rtol=1e-3)


class _Interrupting(Conversations):
    """Conversations whose reading is interrupted after some batches."""

    def __init__(self, data: Conversations, batches: int) -> None:
        self.data, self.left = data, batches

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> object:
        if name == "hidden":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return getattr(self.data, name)


def test_chunked_loss_is_the_plain_one(target: PreTrainedModel, conversations: Path) -> None:
    data = load_conversations(conversations)
    without = np.setdiff1d(np.arange(300), data.ids[data.role == ANSWER][:3])  # some answers lie outside the head
    draft = Draft(target, SETTINGS.kept_layers, without)
    batch = make_batch(data, np.arange(4), PREFIX)
    states = torch.randn(len(batch.where), 64, requires_grad=True)
    loss, hits = distillation_loss(draft, states, batch, user_weight=0.3, argmax_weight=0.5, chunk=7)
    (gradient,) = torch.autograd.grad(3 * loss, states)

    logits = states @ draft.head.T
    soft = torch.nn.functional.cross_entropy(logits, (batch.teacher @ draft.head.T).softmax(-1), reduction="none")
    rows = {int(v): i for i, v in enumerate(without)}
    top = torch.tensor([rows.get(int(v), -100) for v in batch.ids])
    hard = torch.nn.functional.cross_entropy(logits, top, reduction="none", ignore_index=-100)
    per_position = torch.where(batch.answer, soft + 0.5 * hard, 0.3 * soft)
    plain = per_position.sum() / torch.where(batch.answer, 1.0, 0.3).sum()
    (expected,) = torch.autograd.grad(3 * plain, states)
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(hits, (logits.argmax(-1) == top)[batch.answer])


def test_batches_cover_every_conversation_once() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 2500)
    plan = plan_batches(lengths, 3000, 10, np.random.default_rng(1))
    assert sorted(np.concatenate(plan)) == list(range(2500))
    assert all(len(b) * (10 + lengths[b].max()) <= 3000 for b in plan)


def test_export_round_trips_through_the_loader(target: PreTrainedModel, conversations: Path, tmp_path: Path) -> None:
    draft = _draft(target, load_conversations(conversations)).eval()
    target.save_pretrained(tmp_path / "target")
    export_draft(draft, "smollm2", tmp_path / "draft.safetensors")
    with safe_open(tmp_path / "draft.safetensors", "pt") as f:
        assert f.metadata() == {"format": "speckv-draft", "version": "1", "target": "smollm2", "kept_layers": "0,2"}
        assert not any("embed" in name or "lm_head" in name for name in f.keys())  # noqa: SIM118
    model, head_ids, _ = load_shipped_draft(tmp_path / "target", torch.device("cpu"), tmp_path / "draft.safetensors")
    assert torch.equal(head_ids, draft.head_ids)
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, draft(ids) @ draft.head.T, atol=2e-2, rtol=1e-2)


def test_prompts_are_disjoint_and_balanced() -> None:
    train, test = bundled("train"), bundled("test")
    assert len({prompt.text for prompt in train + test}) == 160
    for prompts in (train, test):
        assert Counter(prompt.task for prompt in prompts) == dict.fromkeys(SEEDS, 20)


def test_settings_are_plain_json() -> None:
    loaded = json.loads(json.dumps(SETTINGS.as_dict()))
    assert Settings(**loaded | {"kept_layers": tuple(loaded["kept_layers"])}) == SETTINGS
    assert {f.name for f in dataclasses.fields(Settings)} == set(loaded)
