"""Runs inside vLLM: greedy outputs of prompts, and what vLLM's lookups propose at each of their positions.

Reads one JSON object from standard input, and writes one to the file that it names. Needs nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Decode and look up."""
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as look_up

    asked: dict[str, Any] = json.load(sys.stdin)
    most = asked["gamma"]
    llm = LLM(asked["model"], dtype=asked["dtype"], enforce_eager=True, max_model_len=1024, gpu_memory_utilization=0.1)
    settings = SamplingParams(temperature=0.0, max_tokens=asked["output_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], settings, use_tqdm=False)
    found = []
    for prompt, output in zip(asked["prompts"], outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        whole = np.array(prompt + tokens, dtype=np.int32)
        looked = [
            look_up(whole[: len(prompt) + t], asked["min_ngram"], asked["max_ngram"], 1024, most).tolist()
            for t in range(len(tokens))
        ]
        found.append({"tokens": tokens, "lookups": looked})
    Path(asked["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
