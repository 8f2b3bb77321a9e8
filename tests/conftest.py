"""Tiny random models for quick tests, and the real pair for the slow ones."""

from __future__ import annotations

import os

# Nothing in a test may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch

from speckv_online.models.pairs import LoadedPair, load_pair
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama, tiny_tokenizer

# Tiny matrices gain nothing from a second thread, and lose much to it where the machine has other work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that start a Ray in one process of ``--dist loadgroup``: two at a time would starve each other.

    They come first: all others are divided between the processes while those run.
    """
    ray = [item for item in items if item.get_closest_marker("ray")]
    for item in ray:
        item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A tiny pair on disk: ``--target target_dir --draft draft_dir`` works with it."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    target = tiny_llama()
    draft = perturbed(target, 0.03)
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return TinyPair(folder / "target", folder / "draft", target, draft, tokenizer)


@pytest.fixture(scope="session")
def real_pair() -> LoadedPair:
    """The default pair in fp32; only for tests marked ``slow``."""
    return load_pair(level="fp32", device="cpu")
