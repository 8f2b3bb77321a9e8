"""How much long outputs and long contexts gain: a policy against plain decoding, greedy, in turns by prompt.

Long greedy outputs of small models repeat themselves, and repeated text is easy to draft: the share of it stands beside
every gain. Nothing ends an output. The policy learns from prompt to prompt; the first prompts warm up and do not count.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.common.bundled_prompts import bundled
from experiments.config import launch, option
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.errors import UserError
from speckv_online.io.manifest import cores
from speckv_online.io.prompts import choose
from speckv_online.models.pairs import LoadedPair, chat_prompt, load_pair
from speckv_online.models.quiet import quiet_libraries
from speckv_online.profiling.calibration import calibrate
from speckv_online.stats import goodput, paired_ratio

#: A token is repeated text if it and so many before it stood in the output before.
SPAN = 8
PLAIN = "autoregressive"


@dataclass(frozen=True)
class LongConfig:
    """Settings of ``python -m experiments.bench.long``."""

    pair: str = option("smollm2", "named model pair, see `speckv models`")
    levels: tuple[str, ...] = option(("fp16", "nf4"), "compression levels, comma separated")
    policy: str = option("online", "policy that decodes")
    prompts: int = option(8, "how many of the bundled held-out prompts")
    warm_up: int = option(1, "prompts before them that do not count")
    context: int = option(0, "least tokens of a prompt: other texts are put before it")
    max_new_tokens: int = option(512, "tokens to decode per prompt")
    threads: int = option(0, "CPU threads (0: all cores)")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        if min(self.prompts, self.max_new_tokens) < 1 or min(self.warm_up, self.context) < 0:
            raise UserError("--prompts and --max-new-tokens must be at least 1, --warm-up and --context not below 0")
        if not self.levels or not 0 <= self.threads <= 1024:
            raise UserError("--levels must name at least one, and --threads be from 0 to 1024")
        make_policy(self.policy)


def repeated(tokens: Sequence[int]) -> float:
    """Return the share of tokens that end a span which stood in the text before."""
    spans = [tuple(tokens[i - SPAN : i]) for i in range(SPAN, len(tokens) + 1)]
    return (len(spans) - len(set(spans))) / max(len(tokens), 1)


def prompts_of(config: LongConfig, pair: LoadedPair) -> list[list[int]]:
    """Return the prompts, those that warm up first."""
    asked = choose(bundled("train"), config.warm_up, seed=0) if config.warm_up else []
    asked = [*asked, *choose(bundled("test"), config.prompts, seed=0)]
    others, found = [p.text for p in bundled("train")], list[list[int]]()
    for number, prompt in enumerate(asked):
        text, ids, at = prompt.text, chat_prompt(pair.tokenizer, prompt.text), number
        while len(ids) < config.context:
            text, at = f"{others[at % len(others)]}\n\n{text}", at + 1
            ids = chat_prompt(pair.tokenizer, text)
        found.append(ids)
    return found


def bench_level(config: LongConfig, level: str) -> dict[str, Any]:
    """Run one level; seconds are wall clock."""
    pair = load_pair(config.pair, level=level, device="cpu")
    prompts = prompts_of(config, pair)
    cost, decoders = calibrate(pair.target, pair.drafter, level, prompts[0][:64]), dict[str, SpeculativeDecoder]()
    for spec in (PLAIN, config.policy):
        decoders[spec] = SpeculativeDecoder(pair.drafter, policy=make_policy(spec), target=pair.target, level=level)
        decoders[spec].policy.set_costs(level, cost)
    calls = {spec: list[tuple[int, float]]() for spec in decoders}
    repeats, own, steps, lengths, differing = list[float](), 0.0, 0, list[int](), 0
    for number, prompt in enumerate(prompts):
        turns = [PLAIN, config.policy] if number % 2 else [config.policy, PLAIN]
        outs = {spec: decoders[spec].generate(prompt, config.max_new_tokens, eos_ids=()) for spec in turns}
        print(f"{level}: prompt {number + 1}/{len(prompts)}", file=sys.stderr, flush=True)
        if number < config.warm_up:
            continue
        for spec, out in outs.items():
            calls[spec].append((len(out.tokens), out.seconds))
        out = outs[config.policy]
        differing += out.tokens != outs[PLAIN].tokens
        repeats.append(repeated(out.tokens))
        own += sum(s.decide_seconds + s.learn_seconds for s in out.steps)
        steps += len(out.steps)
        lengths.append(len(prompt))
    columns = {spec: tuple(map(list, zip(*found, strict=True))) for spec, found in calls.items()}
    gain = paired_ratio(*columns[config.policy], *columns[PLAIN])
    low, high = (None, None) if math.isnan(gain.low) else (gain.low, gain.high)  # JSON has no NaN
    return {
        "level": level, "prompts": config.prompts, "mean_prompt_tokens": float(np.mean(lengths)),
        "max_new_tokens": config.max_new_tokens,
        "tokens_per_second": {spec: goodput(*found) for spec, found in columns.items()},
        "gain": {"ratio": gain.value, "low": low, "high": high}, "repeated": float(np.mean(repeats)),
        "policy_ms_per_step": 1e3 * own / steps, "differing": differing,
    }  # fmt: skip


def show(config: LongConfig, results: Sequence[dict[str, Any]]) -> str:
    """Format the measurements."""
    lines = [f"{config.policy} over plain decoding, {config.max_new_tokens} tokens, whole calls, measured in turns", ""]
    for r in results:
        gain, rate = r["gain"], r["tokens_per_second"]
        interval = "" if gain["low"] is None else f" [{gain['low']:.2f}, {gain['high']:.2f}]"
        lines.append(
            f"{r['level']:6} {gain['ratio']:.2f}{interval}  ({rate[config.policy]:.1f} and {rate[PLAIN]:.1f} tokens/s; "
            f"prompts of {r['mean_prompt_tokens']:.0f} tokens; {r['repeated']:.0%} repeated text; the policy takes "
            f"{r['policy_ms_per_step']:.2f} ms a step; outputs that differ: {r['differing']})"
        )
    return "\n".join(lines)


def bench(config: LongConfig) -> int:
    """Run the benchmark and print it."""
    quiet_libraries()
    torch.set_num_threads(config.threads or cores())
    results = [bench_level(config, level) for level in config.levels]
    print(json.dumps({"kind": "measured", "levels": results}, indent=1) if config.json else show(config, results))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, LongConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
