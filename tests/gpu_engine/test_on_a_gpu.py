"""What only a GPU can show: real graphs, and steps that do not wait for the device but once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.chunked import ChunkedDrafter
from speckv_online.gpu_engine.graph_capture import CudaCapture
from speckv_online.gpu_engine.graphed_llama import GraphedLlama, attach
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.tiny_models import perturbed, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found"),
]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    target = tiny_llama()
    draft = perturbed(target, 0.03)
    return target.cuda(), draft.cuda()


@torch.inference_mode()
def test_logits_are_the_models(models: tuple[Any, Any]) -> None:
    target, _ = models
    graphs = GraphedLlama(target)
    assert isinstance(graphs.capture, CudaCapture)
    cache, text = graphs.cache(64), list[int]()
    assert cache is not None
    for width in (40, 1, 5, 1, 5, 17, 17, 17, 17, 17, 17, 1, 1):
        new = prompt_of(width, width)
        found = graphs.read(new, cache, width)
        expected = target(input_ids=torch.tensor([text + new], device="cuda")).logits[0, -width:]
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
        text = (text + new)[: len(text) + width - (width > 1)]
        cache.truncate(len(text))
    assert not graphs.failure
    assert graphs.captures == len(cache.room.graphs) > 0


@pytest.mark.parametrize(
    "policy",
    ["fixed:0", "fixed:5", "online", Scripted([6, 0, 3], ask_per_token=True)],
    ids=lambda p: p if isinstance(p, str) else type(p).__name__,
)
def test_greedy_decoding_is_plain_decoding(models: tuple[Any, Any], policy: Any) -> None:
    target, draft = models
    graphs, drafter = attach(target), ChunkedDrafter(draft, target.config.vocab_size)
    expected = plain(tiny_llama(), prompt_of(40), 60)
    for _ in range(2):
        found = SpeculativeDecoder(drafter, policy=policy, target=target).generate(prompt_of(40), 60).tokens
        assert found == expected
    assert graphs.captures
    assert not graphs.failure
    assert not drafter.graphs.failure


@torch.inference_mode()
def test_reads_and_drafts_do_not_wait_for_the_device(models: tuple[Any, Any]) -> None:
    target, draft = models
    graphs, drafter = GraphedLlama(target), ChunkedDrafter(draft, target.config.vocab_size)
    cache = graphs.cache(64)
    assert cache is not None
    drafter.begin(prompt_of(10), 64)
    for turn in range(3):  # the first reads ten tokens, the second one; recording waits
        if turn == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            found = drafter.draft_async(4)
            logits = graphs.read([5], cache, 5, found)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert logits.shape == (5, 260)
        drafter.end(0)
        drafter.extend([7])
        cache.truncate(0)
    assert not graphs.failure
    assert not drafter.graphs.failure


def test_a_forward_that_waits_is_not_recorded(models: tuple[Any, Any]) -> None:
    """The failed recording leaves the device, the stream and the tokens as they were."""
    target = perturbed(models[0], 0.0).cuda()
    embed, forward = target.model.embed_tokens, type(target.model.embed_tokens).forward

    def waits(ids: torch.Tensor) -> torch.Tensor:
        assert int(ids.max()) >= 0
        return forward(embed, ids)

    embed.forward, embed._hf_hook = waits, None
    graphs, before = attach(target), torch.cuda.current_stream()
    decoder = SpeculativeDecoder(None, policy="fixed:0", target=target)
    assert decoder.generate(prompt_of(40), 20).tokens == plain(tiny_llama(), prompt_of(40), 20)
    assert graphs.failure
    assert torch.cuda.current_stream() == before
    assert torch.rand(3, device="cuda").isfinite().all()  # the generator was taking part in the recording
