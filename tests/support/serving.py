"""Policies and an engine for tests of serving; run as a program, it decodes with a real vLLM and prints JSON."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from policies.base import Context, Decision, Draft, Policy


class Wild(Policy):
    """Another number of drafts at every step and for every request, and verifies any number of them."""

    def decide(self, context: Context) -> Decision:
        gamma = int(self.rng.choice([0, 0, 0, 1, 2, 4, 8]))
        return Decision(self.new_id(), min(gamma, context.max_gamma), ask_at_submit=True)

    def submit(self, decision: Decision, draft: Draft) -> int:
        return int(self.rng.integers(0, draft.drafted + 1))


class Pauses(Policy):
    """Drafts four tokens in steps 1 to 10 of a request, none in the next 10, and so on."""

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(4 * (context.step % 20 < 10), context.max_gamma))


class Raises(Policy):
    """Fails at every third decision."""

    def decide(self, context: Context) -> Decision:
        if (id := self.new_id()) % 3 == 0:
            raise RuntimeError("made to fail")
        return Decision(id, min(2, context.max_gamma))


def make_models(folder: Path) -> None:
    """Write a tiny target, and a draft that is often right about it."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.12, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    target = LlamaForCausalLM(config)
    target.save_pretrained(folder / "target")
    for weight in target.parameters():
        weight.data += 0.01 * torch.randn_like(weight)
    target.save_pretrained(folder / "draft")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / "target")


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Return token ids; some repeat themselves, so that lookups find something."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        part = [draw.randrange(256) for _ in range(draw.randrange(2, 12))]
        found.append((part * draw.randrange(1, 5))[: draw.randrange(3, 40)])
    return found


def main(folder: str, method: str, policy: str, task: str, lazy: str = "lazy") -> dict[str, Any]:
    """Decode; return the outputs, or what became of requests, and what the plug-in counted."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    speculative: dict[str, Any] | None = {"method": method, "num_speculative_tokens": 8}
    if method == "ngram":
        speculative |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}  # type: ignore[operator]
    elif method == "draft_model":
        speculative |= {"model": f"{folder}/draft"}  # type: ignore[operator]
    else:
        speculative = None
    options: dict[str, Any] = {}
    if policy:
        options = {
            "scheduler_cls": "speckv_online.serving.vllm.PolicyScheduler",
            "additional_config": {"speckv": {"policy": policy}},
        }
    llm = LLM(
        f"{folder}/target", dtype="float32", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True, seed=0,
        max_num_seqs=16 if task == "cancel" else 8, gpu_memory_utilization=0.1, speculative_config=speculative,
        async_scheduling=False, **options,
    )  # fmt: skip
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    if lazy == "eager":
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        from speckv_online.serving.lazy_draft import LazyDraft

        lazy_draft = DraftModelProposer.propose.__closure__
        next(cell.cell_contents for cell in lazy_draft if isinstance(cell.cell_contents, LazyDraft)).skips = False
        scheduler._read = None
    settings = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, detokenize=False)
    found: dict[str, Any] = {}
    if policy:
        found["asked"] = watch(llm.llm_engine.engine_core.engine_core)
    if task == "cancel":
        found["requests"] = cancel(llm.llm_engine, settings)
    off = settings.clone()
    off.extra_args = {"speckv": {"max_gamma": 0}}
    asked = [{"prompt_token_ids": tokens} for tokens in prompts(64)]
    each = [off if task == "off" and i % 2 else settings for i in range(64)]
    found["outputs"] = [list(o.outputs[0].token_ids) for o in llm.generate(asked, each, use_tqdm=False)]
    if policy:
        found["counts"] = scheduler._speckv.collect().as_json()
        found["left"] = len(scheduler._speckv._asking) - len(scheduler.finished_req_ids)
    return found


def watch(core: Any) -> dict[str, int]:
    """Count the messages that ask a worker for drafts, and the runs of its rejection sampler."""
    found, call = {"drafts": 0, "verified": 0}, core.model_executor.collective_rpc

    def count(method: Any, *arguments: Any, **named: Any) -> Any:
        found["drafts"] += method == "take_draft_token_ids"
        return call(method, *arguments, **named)

    def verified(*_: Any) -> None:
        found["verified"] += 1

    core.model_executor.collective_rpc = count
    core.model_executor.driver_worker.worker.model_runner.rejection_sampler.register_forward_pre_hook(verified)
    return found


def cancel(engine: Any, settings: Any) -> dict[str, int]:
    """Send 1,000 requests, at most 16 at a time, and cancel some at any time; return how many ended how."""
    draw, asked = random.Random(1), prompts(1000, seed=1)
    alive, ended = set[str](), {"finished": 0, "cancelled": 0}
    steps = 0
    while asked or alive:
        while asked and len(alive) < 16:
            id = f"request-{len(asked)}"
            short = settings.clone()
            short.max_tokens = draw.randrange(1, 24)
            engine.add_request(id, {"prompt_token_ids": asked.pop()}, short)
            alive.add(id)
        for output in engine.step():
            if output.finished and output.request_id in alive:
                alive.discard(output.request_id)
                ended["finished"] += 1
        for id in sorted(alive):
            if draw.random() < 0.03:
                engine.abort_request([id])
                alive.discard(id)
                ended["cancelled"] += 1
        steps += 1
        assert steps < 20_000, "stuck"
    return ended


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
